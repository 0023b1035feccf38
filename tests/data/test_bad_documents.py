"""One document ends no run: what a template refuses, or a model has no row for, is skipped, counted and named."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import RobertaConfig, RobertaModel

from hf_msae.cli.arguments import SourceArguments
from hf_msae.cli.sources import load_training_data
from hf_msae.data import DatasetError, TokenWindows, as_documents, load_documents, pad_id, vocabulary, windows
from hf_msae.training import SAETrainingArguments
from hf_msae.training.loaders import window_length

REFUSING = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    "{% if tools %}{% for t in tools %}{{ t['name'] }} {% endfor %}{% endif %}"
    "{% for m in messages %}{{ m['content'] | trim }} {% endfor %}"
)
SYSTEM = [{"role": "system", "content": "w1"}, {"role": "user", "content": "w2"}]
BAD = st.sampled_from([{"messages": SYSTEM}, {"messages": None}, {"messages": "no chat"}, {"messages": [3.5]}, None])


def ids(given) -> list[list[int]]:
    return [window.input_ids.tolist() for window in given]


@pytest.fixture(scope="module")
def refusing(build_tokenizer):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = REFUSING
    return tokenizer


@settings(max_examples=30, deadline=None)
@given(data=st.data(), number=st.integers(1, 40), stop=st.integers(0, 30), pack=st.booleans())
def test_windows_are_those_of_the_stream_without_bad_documents(refusing, data, number, stop, pack):
    good = [{"messages": [{"role": "user", "content": f"w{i % 60} w{i * 7 % 60}"}]} for i in range(number)]
    mixed, bad_places = [good[0]], []
    for row in [*good[1:], None]:
        for bad in data.draw(st.lists(BAD, max_size=3)):
            bad_places.append(len(mixed))
            mixed.append(bad)
        mixed += [row] if row is not None else []
    # Token ids beyond the embedding are as bad.
    expected = ids(TokenWindows(good, refusing, context_length=8, pack=pack, vocab_size=80))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows, "DOCUMENTS_PER_BATCH", 3)
        documents = as_documents(mixed)
        stopped = TokenWindows(documents, refusing, context_length=8, pack=pack, vocab_size=80)
        seen = ids(window for _, window in zip(range(stop), stopped, strict=False))
        state = json.loads(json.dumps(stopped.state_dict()))
        resumed = TokenWindows(documents, refusing, context_length=8, pack=pack, vocab_size=80)
        resumed.load_state_dict(state)
        assert seen + ids(resumed) == expected
    assert documents.unreadable == set(bad_places)


def test_tokens_that_the_embedding_lacks_are_skipped_and_named(tokenizer, lm, caplog):
    rows = [{"input_ids": [4, 5, 6]}, {"input_ids": [4, 80]}, {"input_ids": [-1, 4]}, {"input_ids": [7]}]
    documents = as_documents(rows)
    assert vocabulary(lm) == 80
    given = TokenWindows(documents, tokenizer, context_length=9, pack=False, vocab_size=vocabulary(lm))
    assert ids(given) == [[1, 4, 5, 6], [1, 7]]
    assert documents.unreadable == {1, 2}
    assert "token id 80, but the embedding of the model has 80 rows" in caplog.text


def test_the_filler_has_a_row(build_tokenizer):
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<|fill|>"})
    assert tokenizer.pad_token_id == 67
    assert pad_id(tokenizer, 68) == 67
    assert pad_id(tokenizer, 67) == tokenizer.eos_token_id
    assert pad_id(tokenizer, 1) == 0


def test_all_refused_says_why(refusing):
    with pytest.raises(DatasetError, match="no system turn"):
        list(TokenWindows([SYSTEM] * 9, refusing, context_length=9))


def test_tools_nulls_json_and_missing_content(refusing):
    call = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{}"}], "name": None}
    chat = [{"role": "user", "content": "w1"}, call]
    tools = [{"name": "w9", "description": None}]
    rows = [
        {"messages": chat, "tools": tools},
        {"messages": json.dumps(chat), "tools": json.dumps(tools)},
        {"messages": chat, "tools": None},
    ]
    documents = list(as_documents(rows))
    assert (
        documents[0]
        == documents[1]
        == [chat[0], {"role": "assistant", "content": "", "tool_calls": call["tool_calls"]}]
    )
    given = ids(TokenWindows(rows, refusing, context_length=9, pack=False))
    assert given == [[1, 13, 5], [1, 13, 5], [1, 5]]
    with pytest.raises(DatasetError, match="holds text that is not a chat"):
        as_documents([{"messages": "words"}], messages_column="messages")


def test_text_that_holds_bos_gets_no_second_one(build_tokenizer):
    tokenizer = build_tokenizer()
    texts = ["<s> w1 w2", "<s> <s> w1 w2", "w1 w2"]
    assert ids(TokenWindows(texts, tokenizer, context_length=9, pack=False)) == [[1, 5, 6]] * 3
    assert ids(TokenWindows(texts, tokenizer, context_length=12)) == [[1, 5, 6] * 3]


def test_a_document_a_line(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("one\ntwo\n\nthree\n")
    documents, _ = load_training_data(SourceArguments(dataset=str(path), separator="\\n"))
    assert list(documents) == ["one", "two", "three"] == list(load_documents(path, separator="\n"))


def test_the_first_row_may_be_bad(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('no json\n{"text": "a"}\n')
    assert list(load_documents(path)) == ["a"]


@pytest.mark.parametrize("padding", [0, 1, 3])
def test_robertas_window_is_what_its_positions_hold(padding):
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = RobertaConfig(vocab_size=20, max_position_embeddings=18, pad_token_id=padding, **sizes)
    model = RobertaModel(config).eval()
    length = window_length(model, SAETrainingArguments())
    assert length == 17 - padding
    model(input_ids=torch.full((1, length), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, length + 1), 5))
    with pytest.raises(ValueError, match=f"more than the {length} positions"):
        window_length(model, SAETrainingArguments(context_length=length + 1))
