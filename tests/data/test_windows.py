"""Token windows: no token lost, every window begins with BOS, special tokens never count, resumed = uninterrupted."""

import json
import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AddedToken

from hf_msae.data import DatasetError, TokenWindows, Window, as_documents, collate, count_tokens, windows
from hf_msae.data.windows import DocumentEncoder

BOS, EOS, PAD, UNK = 1, 2, 0, 3
DOCUMENTS = st.lists(st.lists(st.integers(0, 59), max_size=25), min_size=1, max_size=12)
CHATS = [
    [{"role": "user", "content": f"w{i} w{i + 1}"}, {"role": "assistant", "content": f"w{i + 2}"}] for i in range(4)
]


def as_texts(documents: list[list[int]]) -> list[str]:
    return [" ".join(f"w{i}" for i in words) for words in documents]


def ids(window: Window) -> list[int]:
    return window.input_ids.tolist()


@pytest.fixture
def small_batches(monkeypatch) -> None:
    """Three documents a batch, so that a few documents have several batches."""
    monkeypatch.setattr(windows, "DOCUMENTS_PER_BATCH", 3)


@settings(max_examples=30, deadline=None)
@given(documents=DOCUMENTS.filter(lambda d: any(d)), context_length=st.integers(2, 20))
def test_packing_conserves_tokens_and_starts_every_window_with_bos(tokenizer, documents, context_length):
    packed = list(TokenWindows(as_texts(documents), tokenizer, context_length=context_length))
    assert all(ids(window)[0] == BOS for window in packed)
    assert [len(ids(window)) for window in packed[:-1]] == [context_length] * (len(packed) - 1)
    assert 1 <= len(ids(packed[-1])) <= context_length
    kept = [token for window in packed for token in window.input_ids[window.keep].tolist()]
    assert kept == [4 + word for document in documents for word in document]
    # Apart from the BOS of the windows, the stream is BOS and words of each document in turn.
    starts = sum(ids(window).count(BOS) for window in packed)
    assert sum(map(bool, documents)) <= starts <= sum(map(bool, documents)) + len(packed)


def test_packing_by_hand(tokenizer):
    packed = TokenWindows(["w0 w1 w2 w3", "", "w4", "w5 w6"], tokenizer, context_length=4)
    assert [ids(window) for window in packed] == [[1, 4, 5, 6], [1, 7, 1, 8], [1, 9, 10]]
    assert [window.keep.tolist() for window in packed][1] == [False, True, False, True]
    assert (packed.num_documents, packed.num_windows, packed.num_truncated) == (4, 3, 0)


def test_a_tokenizer_without_bos_packs_without(build_tokenizer):
    tokenizer = build_tokenizer(bos=False)
    packed = list(TokenWindows(["w0 w1 w2", "w3 w4"], tokenizer, context_length=2))
    assert [ids(window) for window in packed] == [[4, 5], [6, 7], [8]]
    assert all(window.keep.all() for window in packed)


def test_one_document_a_window_without_packing(tokenizer):
    unpacked = TokenWindows(["w0 w1 w2 w3 w4", "w5", ""], tokenizer, context_length=4, pack=False)
    assert [ids(window) for window in unpacked] == [[1, 4, 5, 6], [1, 9]]
    assert unpacked.num_truncated == 2


def test_special_tokens_never_count(tokenizer):
    text = "w0 <s> w1 </s> nonsense <pad> <|mark|> w2"
    (window,) = TokenWindows([text], tokenizer, context_length=20)
    assert ids(window) == [BOS, 4, BOS, 5, EOS, UNK, PAD, 66, 6]
    assert window.keep.tolist() == [False, True, False, True, False, False, False, False, True]
    encoder = DocumentEncoder(tokenizer)
    everything = encoder.window(list(range(len(tokenizer))))
    assert (~everything.keep).nonzero().flatten().tolist() == sorted(encoder.special_ids) == [0, 1, 2, 3, 66]
    assert set(tokenizer.all_special_ids) <= encoder.special_ids


def test_chats_go_through_the_template(tokenizer):
    (window,) = TokenWindows(CHATS[:1], tokenizer, context_length=20)
    assert ids(window) == [BOS, 66, 64, 4, 5, 66, 65, 6, EOS]
    assert window.input_ids[window.keep].tolist() == [64, 4, 5, 65, 6]
    mixed = ["w9", *CHATS, "w8"]
    alone = [ids(next(iter(TokenWindows([document], tokenizer, context_length=20)))) for document in mixed]
    assert [ids(window) for window in TokenWindows(mixed, tokenizer, context_length=20, pack=False)] == alone


def test_chats_need_a_template(build_tokenizer):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(DatasetError, match="has no chat template"):
        next(iter(TokenWindows(CHATS, tokenizer, context_length=8)))


@pytest.mark.usefixtures("small_batches")
@settings(max_examples=30, deadline=None)
@given(
    documents=DOCUMENTS.filter(lambda d: any(d)),
    context_length=st.integers(2, 9),
    stop=st.integers(0, 40),
    pack=st.booleans(),
)
def test_resumed_equals_uninterrupted(tokenizer, documents, context_length, stop, pack):
    def fresh() -> TokenWindows:
        return TokenWindows(as_texts(documents), tokenizer, context_length=context_length, pack=pack)

    whole = fresh()
    expected = [ids(window) for window in whole]
    cut_off = 0 if pack else sum(max(0, len(words) + 1 - context_length) for words in documents if words)
    assert (whole.num_documents, whole.num_windows, whole.num_truncated) == (len(documents), len(expected), cut_off)
    stopped = fresh()
    seen = [ids(window) for _, window in zip(range(stop), stopped, strict=False)]
    state = json.loads(json.dumps(stopped.state_dict()))
    assert len(state["batch"]["carry"]) < context_length
    resumed = fresh()
    resumed.load_state_dict(state)
    assert seen + [ids(window) for window in resumed] == expected
    assert (resumed.num_documents, resumed.num_windows, resumed.num_truncated) == (
        whole.num_documents,
        whole.num_windows,
        whole.num_truncated,
    )
    assert [ids(window) for window in resumed] == expected


def test_batches_of_documents_do_not_show(tokenizer, texts, monkeypatch):
    whole = [ids(window) for window in TokenWindows(texts, tokenizer, context_length=16)]
    monkeypatch.setattr(windows, "DOCUMENTS_PER_BATCH", 7)
    assert [ids(window) for window in TokenWindows(texts, tokenizer, context_length=16)] == whole


def test_other_readers_of_the_documents_move_nothing(tokenizer):
    documents = as_documents(["w0", "w1", "w2"])
    next(iter(documents))
    packed = TokenWindows(documents, tokenizer, context_length=2)
    resumed = TokenWindows(documents, tokenizer, context_length=2)
    resumed.load_state_dict(packed.state_dict())
    next(iter(documents))
    assert [ids(window) for window in resumed] == [ids(window) for window in packed] == [[1, 4], [1, 5], [1, 6]]


def test_a_special_token_without_a_role_does_not_count(build_tokenizer):
    tokenizer = build_tokenizer()
    tokenizer.add_tokens([AddedToken("<|extra|>", special=True), AddedToken("ordinary", special=False)])
    extra, ordinary = tokenizer.convert_tokens_to_ids(["<|extra|>", "ordinary"])
    assert extra not in tokenizer.all_special_ids
    (window,) = TokenWindows(["w0 <|extra|> ordinary"], tokenizer, context_length=9)
    assert window.input_ids[window.keep].tolist() == [4, ordinary]


def test_count_tokens_counts_words(tokenizer, texts):
    assert count_tokens(texts, tokenizer) == sum(len(text.split()) for text in texts)
    shard = as_documents(texts).shard(1, 3)
    assert count_tokens(shard, tokenizer) == sum(len(text.split()) for text in texts[1::3])


def test_collate_pads_on_the_right_and_masks_only_then():
    short = Window(torch.tensor([1, 5]), torch.tensor([False, True]))
    long = Window(torch.tensor([1, 6, 7]), torch.tensor([False, True, True]))
    batch = collate([short, long], pad_id=9)
    assert batch["input_ids"].tolist() == [[1, 5, 9], [1, 6, 7]]
    assert batch["keep"].tolist() == [[False, True, False], [False, True, True]]
    assert batch["attention_mask"] is not None
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert collate([long, long], pad_id=9)["attention_mask"] is None


def test_long_documents_raise_no_warning(build_tokenizer, caplog):
    fresh = build_tokenizer()
    assert fresh.model_max_length == 16
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        list(TokenWindows(["w1 " * 50, CHATS[0] * 20], fresh, context_length=16))
    finally:
        logger.removeHandler(caplog.handler)
    assert caplog.text == ""


def test_bad_arguments_and_empty_data(tokenizer):
    with pytest.raises(ValueError, match=r"context_length must be at least 2 .* got 1"):
        TokenWindows(["w1"], tokenizer, context_length=1)
    with pytest.raises(DatasetError, match=r"empty dataset: none of the 2 documents of 2 documents in memory"):
        list(TokenWindows(["", "<s> </s>"], tokenizer, context_length=4))
    state = TokenWindows(["w1"], tokenizer, context_length=4).state_dict()
    with pytest.raises(ValueError, match="'context_length': 4"):
        TokenWindows(["w1"], tokenizer, context_length=5).load_state_dict(state)


def test_real_tokenizer_and_stories(stories260k, shared_data):
    _, tokenizer = stories260k
    text = (shared_data / "tinystories.txt").read_text(encoding="utf-8")[:100_000]
    stories = [story.strip() for story in text.split("<|endoftext|>")]
    packed = list(TokenWindows(stories, tokenizer, context_length=128))
    kept = torch.cat([window.input_ids[window.keep] for window in packed])
    expected = [token for story in stories for token in tokenizer(story, verbose=False)["input_ids"]]
    assert kept.tolist() == [token for token in expected if token not in tokenizer.all_special_ids]
    assert {ids(window)[0] for window in packed} == {tokenizer.bos_token_id}


def test_an_encoders_windows_begin_with_cls(build_tokenizer):
    tokenizer = build_tokenizer(bos=False)
    tokenizer.add_special_tokens({"cls_token": "<s>"})
    assert [ids(window) for window in TokenWindows(["w0 w1 w2"], tokenizer, context_length=3)] == [[1, 4, 5], [1, 6]]
