"""Held-out documents: the same whoever asks, never trained on, from all parts of the data."""

import random

import datasets
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hf_msae.data import DatasetError, Split, as_documents, hold_out, hold_out_for_training, load_documents
from hf_msae.data.hash_split import hash_value
from hf_msae.data.holding_out import BASE_SHARE, BASE_SPLIT, MOST_TOKENS, HeldOutWindows
from hf_msae.data.windows import DocumentEncoder

pytestmark = pytest.mark.slow

KINDS = ("list", "arrow", "stream", "txt", "jsonl")


def of_kind(kind: str, texts: list[str], folder):
    """The documents in one of the forms that can be read."""
    if kind == "list":
        return as_documents(texts)
    dataset = datasets.Dataset.from_dict({"text": texts})
    if kind in ("arrow", "stream"):
        return as_documents(dataset if kind == "arrow" else dataset.to_iterable_dataset())
    path = folder / f"texts.{kind}"
    if kind == "txt":
        path.write_text("\n\n".join(texts))
    else:
        dataset.to_json(path)
    return load_documents(path)


def words(held_out: HeldOutWindows) -> list[int]:
    """The tokens that count."""
    return [token for window in held_out.windows for token in window.input_ids[window.keep].tolist()]


def distinct(number: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(f"w{draw.randrange(60)}" for _ in range(draw.randrange(8, 30))) for _ in range(number)]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 99),
    number=st.integers(20, 400),
    tokens=st.integers(1, 300),
    more=st.integers(-200, 200),
    order=st.integers(0, 99),
    world_size=st.integers(1, 3),
    copies=st.booleans(),
)
def test_what_is_held_out_is_never_trained_on(
    tokenizer, tmp_path_factory, kind, seed, number, tokens, more, order, world_size, copies
):
    texts = distinct(number, seed) * (1 + copies)
    documents = of_kind(kind, texts, tmp_path_factory.mktemp("data"))
    try:
        held_out = hold_out_for_training(documents, tokenizer, 16, tokens, max(1, tokens + more))
    except DatasetError as error:
        assume("too few documents for both" not in str(error))
        assume(max(tokens, tokens + more) <= sum(len(text.split()) for text in texts))
        raise
    measuring, calibration, split = held_out.measuring, held_out.calibration, held_out.split
    assert measuring.num_tokens >= tokens
    assert calibration.num_tokens >= tokens + more
    assert hold_out(documents, tokenizer, 16, tokens).facts() == measuring.facts(), "found alone and in one pass"
    view = documents.without(split).shuffle(order)
    trained = [text for rank in range(world_size) for text in view.shard(rank, world_size)]
    assert sorted(trained) == sorted(text for text in texts if not split.holds(hash_value(text)))
    left_out = [text for text in texts if split.holds(hash_value(text))]
    assert measuring.num_tokens + calibration.num_tokens <= sum(len(text.split()) for text in left_out)
    alone = [hash_value(text) < measuring.share for text in left_out]
    ids = {token for text, own in zip(left_out, alone, strict=True) if own for token in text_ids(tokenizer, text)}
    assert set(words(measuring)) <= ids
    # Every later evaluation, of as much text or less, of the same data in another order, stays within that.
    shuffled = random.Random(order).sample(texts, len(texts))
    for fewer in (tokens, max(1, tokens // 2), 1):
        assert hold_out(shuffled, tokenizer, 32, fewer).share <= measuring.share


def text_ids(tokenizer, text: str) -> list[int]:
    (ids,) = DocumentEncoder(tokenizer).encode([text])
    return ids


@pytest.mark.parametrize("kind", KINDS)
def test_a_sorted_corpus_is_held_out_like_a_mixed_one(tokenizer, tmp_path, kind):
    """Of two kinds of text, one after the other, as much is held out as fresh text from the same mix has."""
    draw = random.Random(5)
    texts = [" ".join(f"w{30 * half + draw.randrange(30)}" for _ in range(10)) for half in (0, 1) for _ in range(4000)]
    documents = of_kind(kind, texts, tmp_path)
    held_out = hold_out(documents, tokenizer, 16, 1000)
    # The share of the second kind among 100 documents has a standard deviation of 0.05.
    second = sum(token >= 4 + 30 for token in words(held_out)) / held_out.num_tokens
    assert 0.3 < second < 0.7
    assert held_out.share == BASE_SHARE
    first = [next(iter(documents.without(BASE_SPLIT).shuffle(seed))) for seed in range(12)]
    assert {int(text.split()[0][1:]) >= 30 for text in first} == {False, True}


def test_a_stream_is_read_until_there_is_enough(tokenizer, monkeypatch):
    monkeypatch.setattr("hf_msae.data.shuffling.BLOCK_ROWS", 50)
    read = []

    def rows():
        for text in distinct(5000):
            read.append(text)
            yield {"text": text}

    stream = as_documents(datasets.IterableDataset.from_generator(rows))
    read.clear()
    held_out = hold_out(stream, tokenizer, 16, 200)
    assert held_out.share == BASE_SHARE
    assert held_out.num_read <= len(read) < held_out.num_read + 60 < 2000


def test_small_data_gives_no_more_than_needed(tokenizer):
    texts = distinct(100)
    found = hold_out(texts, tokenizer, 16, 200)
    nearest = sorted(texts, key=hash_value)[: found.num_documents]
    lengths = [len(text.split()) for text in nearest]
    assert sum(lengths[:-1]) < 200 <= sum(lengths) == found.num_tokens
    assert [text for text in sorted(texts, key=hash_value) if hash_value(text) < found.share] == nearest
    assert found.num_read == 100


def test_one_long_document_does_not_stand_for_all(tokenizer):
    long = [" ".join(f"w{(i * 7 + j) % 60}" for j in range(3 * MOST_TOKENS)) for i in range(12)]
    held_out = hold_out([*long, *distinct(400)], tokenizer, 64, 4 * MOST_TOKENS)
    assert held_out.num_tokens <= 5 * MOST_TOKENS
    assert held_out.num_documents >= 4
    assert {len(window.input_ids) for window in held_out.windows[:-1]} == {64}
    assert {int(window.input_ids[0]) for window in held_out.windows} == {tokenizer.bos_token_id}
    with pytest.raises(DatasetError, match=r"cannot hold out 50,000 tokens: .* at most 8,192 are taken.*separator"):
        hold_out(long[:3], tokenizer, 64, 50_000)


def test_pieces_of_long_documents_come_from_all_parts_of_them(tokenizer):
    texts = [" ".join(["w1"] * 20_000 + ["w2"] * 20_000 + [f"w{i}"] * 5) for i in range(60)]
    held_out = hold_out(texts, tokenizer, 64, 15 * MOST_TOKENS)
    second = sum(token == 4 + 2 for token in words(held_out)) / held_out.num_tokens
    assert 0.2 < second < 0.8


def test_lots_are_uniform_and_of_contents():
    numbers = torch.tensor([hash_value(f"text {i}") for i in range(20_000)])
    assert (numbers.sort().values - torch.arange(20_000) / 20_000).abs().max() < 0.015  # Kolmogorov and Smirnov
    assert hash_value("a") != hash_value("b")
    chats = as_documents([[{"role": "user", "content": "a"}], [{"content": "a", "role": "user"}]])
    assert len({hash_value(document) for document in chats}) == 1
    assert hash_value("\ud800") != hash_value("\ud801")


def test_what_cannot_be_held_out_is_told(tokenizer, texts):
    documents = as_documents(texts)
    with pytest.raises(DatasetError, match=r"cannot hold out 10,000 tokens: all 2 documents .* have 3"):
        hold_out(["w0", "w1 w2"], tokenizer, 16, 10_000)
    for view in (documents.shard(0, 2), documents.without(BASE_SPLIT)):
        with pytest.raises(ValueError, match="before sharding"):
            hold_out(view, tokenizer, 16, 200)
    most = sum(len(text.split()) for text in texts) * 3 // 4
    with pytest.raises(DatasetError, match="too few documents for both"):
        hold_out_for_training(texts, tokenizer, 16, most, most)


def test_the_state_of_other_held_out_documents_or_of_an_earlier_version_is_refused(texts):
    documents = as_documents(texts)
    state = documents.without(Split(0.1, 0.1)).shuffle(1).state_dict()
    for other in (documents, documents.without(Split(0.1, 0.1)), documents.without(Split(0.2, 0.1)).shuffle(1)):
        with pytest.raises(ValueError, match="held-out documents"):
            other.load_state_dict(state)
    with pytest.raises(ValueError, match="an earlier hf_msae, which held out the first documents"):
        documents.load_state_dict({"next": 3, "position": 3, "start": 2, "rank": 0, "world_size": 1})
