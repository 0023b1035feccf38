"""The stream: every token's activation exactly once, shuffled within blocks, resumed bit for bit."""

import copy
import json
from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pretended_cuda import DEVICE, pretended_cuda
from torch import Tensor
from transformers import BertConfig, BertModel

from hf_msae.data import (
    ActivationError,
    ActivationStream,
    DatasetError,
    TokenWindows,
    find_norm_limits,
    forward,
    harvest,
    windows,
)
from hf_msae.data.stream import seeded_generator
from hf_msae.sites import Site, resolve_site

SITES = ["embeddings", "layers.0"]
EMBEDDINGS, LAYER = Site("model.embed_tokens"), Site("model.layers.0")


@pytest.fixture
def make_stream(lm, tokenizer, texts):
    """Streams over the first 60 documents in small blocks of 100 tokens."""

    def make(model=lm, sites=SITES, *, documents=texts[:60], pack=True, **changes) -> ActivationStream:
        options = {"batch_size": 32, "block_tokens": 100, "lm_batch_size": 3} | changes
        return ActivationStream(
            model, sites, TokenWindows(documents, tokenizer, context_length=16, pack=pack), **options
        )

    return make


def direct(lm, tokenizer, documents: list[str], pack: bool = True) -> tuple[Tensor, Tensor]:
    """Activations at the two sites from the model's own `output_hidden_states`, one window at a time."""
    embedded, layer = [], []
    for window in TokenWindows(documents, tokenizer, context_length=16, pack=pack):
        with torch.no_grad():
            hidden = lm(window.input_ids[None], output_hidden_states=True).hidden_states
        embedded.append(hidden[0][0, window.keep])
        layer.append(hidden[1][0, window.keep])
    return torch.cat(embedded), torch.cat(layer)


def in_order(rows: Tensor) -> Tensor:
    """Rows sorted along a random direction: equal for equal multisets."""
    direction = torch.randn(rows.shape[1], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return rows[(rows.double() @ direction).argsort()]


@pytest.mark.parametrize("pack", [True, False])
def test_every_token_is_given_once_and_rows_agree_over_sites(make_stream, lm, tokenizer, texts, pack):
    embedded, layer = direct(lm, tokenizer, texts[:60], pack)
    batches = list(make_stream(batch_size=1, pack=pack))
    pairs = torch.cat([torch.cat([batch[EMBEDDINGS], batch[LAYER]], dim=1) for batch in batches])
    assert pairs.shape == (len(layer), 32)
    torch.testing.assert_close(in_order(pairs), in_order(torch.cat([embedded, layer], dim=1)), rtol=0, atol=1e-6)


def test_batches_have_the_size_asked_and_the_rest_is_counted(make_stream, texts):
    total = sum(len(text.split()) for text in texts[:60])
    made = make_stream(batch_size=37)
    batches = list(made)
    assert {batch[site].shape for batch in batches for site in batch} == {(37, 16)}
    assert made.num_tokens == 37 * len(batches)
    assert made.num_tokens + made.num_dropped == total
    assert next(made, None) is None
    assert made.num_tokens + made.num_dropped == total


def test_batches_do_not_depend_on_how_they_are_cut(make_stream):
    small = torch.cat([batch[LAYER] for batch in make_stream(batch_size=10)])
    large = torch.cat([batch[LAYER] for batch in make_stream(batch_size=250)])
    assert torch.equal(small[: len(large)], large)


def test_a_block_is_shuffled_and_only_a_block(make_stream, lm, tokenizer, texts):
    site = resolve_site(lm, "layers.0")
    found = TokenWindows(texts[:60], tokenizer, context_length=16)
    plain = torch.cat([rows[site] for rows in harvest(lm, [site], found, lm_batch_size=3)])
    whole = next(make_stream(batch_size=len(plain), block_tokens=10**6))[LAYER]
    place = torch.cdist(whole.double(), plain.double()).argmin(dim=1)
    assert abs(float(torch.corrcoef(torch.stack([place, torch.arange(len(plain))]).double())[0, 1])) < 0.15
    assert sum(b - a == 1 for a, b in pairwise(place.tolist())) < 5
    first = next(make_stream(batch_size=90, block_tokens=100))[LAYER]
    assert torch.cdist(first.double(), plain[: 100 + 16].double()).min(dim=1).values.max() < 1e-6


def test_blocks_with_the_same_tokens_are_shuffled_differently(make_stream, texts):
    block = [text for text in texts if len(text.split()) == 10][:5]
    assert len(block) == 5
    first, second = make_stream(documents=block * 2, pack=False, batch_size=50, block_tokens=50, lm_batch_size=5)
    assert not torch.equal(first[LAYER], second[LAYER])
    assert torch.equal(in_order(first[LAYER]), in_order(second[LAYER]))


def test_padding_does_not_reach_an_encoder(tokenizer, texts):
    torch.manual_seed(0)
    sizes = {"vocab_size": 80, "hidden_size": 16, "intermediate_size": 24, "max_position_embeddings": 64}
    model = BertModel(BertConfig(num_hidden_layers=2, num_attention_heads=2, **sizes)).eval()
    site = resolve_site(model, "layers.1")
    found = list(TokenWindows(texts[:20], tokenizer, context_length=16, pack=False))
    assert len({len(window.input_ids) for window in found}) > 3
    together, alone = (
        torch.cat([rows[site] for rows in harvest(model, [site], found, lm_batch_size=size)]) for size in (20, 1)
    )
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_seed_shard_and_block_each_change_the_permutation():
    orders = [
        torch.randperm(50, generator=seeded_generator(*numbers)).tolist()
        for numbers in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (1, 1, 0)]
    ]
    assert len({tuple(order) for order in orders}) == 5
    again = torch.randperm(50, generator=seeded_generator(0, 0, 0)).tolist()
    assert again == orders[0]


@pytest.mark.parametrize("changes", [{"seed": 1}, {"shard": 1}])
def test_seed_and_shard_reach_the_batches(make_stream, changes):
    assert not torch.equal(next(make_stream())[LAYER], next(make_stream(**changes))[LAYER])
    assert torch.equal(next(make_stream(**changes))[LAYER], next(make_stream(**changes))[LAYER])


@settings(max_examples=25, deadline=None)
@given(
    stop=st.integers(0, 30),
    batch_size=st.sampled_from([13, 25, 100, 140]),
    block_tokens=st.sampled_from([20, 100, 500]),
    multiple=st.sampled_from([None, 1.1]),
    ahead=st.booleans(),
    ahead_after=st.booleans(),
)
@pytest.mark.slow
def test_resumed_equals_uninterrupted(
    lm, tokenizer, texts, stop, batch_size, block_tokens, multiple, ahead, ahead_after
):
    def fresh(ahead: bool = False) -> ActivationStream:
        found = TokenWindows(texts[:40], tokenizer, context_length=16)
        options = {"batch_size": batch_size, "block_tokens": block_tokens, "norm_limits": limits}
        return ActivationStream(lm, SITES, found, lm_batch_size=4, ahead=ahead, **options)

    some = list(TokenWindows(texts[:40], tokenizer, context_length=16))
    limits = find_norm_limits(lm, [resolve_site(lm, site) for site in SITES], some, multiple=multiple)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows, "DOCUMENTS_PER_BATCH", 7)
        whole = fresh()
        expected = list(whole)
        stopped = fresh(ahead)
        seen = [batch for _, batch in zip(range(stop), stopped, strict=False)]
        resumed = fresh(ahead_after)
        resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
        found = seen + list(resumed)
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert all(torch.equal(ours[site], theirs[site]) for site in (EMBEDDINGS, LAYER))
    assert (resumed.num_tokens, resumed.num_filtered) == (whole.num_tokens, whole.num_filtered)
    assert resumed.num_dropped == whole.num_dropped


def test_resuming_harvests_one_block_at_most(make_stream, monkeypatch):
    made = make_stream(batch_size=25)
    for _ in range(9):
        next(made)
    state = made.state_dict()
    assert state["block"] >= 2
    passes = []
    monkeypatch.setattr(forward, "capture", lambda *a, **k: passes.append(1) or original(*a, **k))
    resumed = make_stream(batch_size=25)
    resumed.load_state_dict(state)
    # A block of 100 tokens is at most 8 windows here, and a pass takes 3 of them.
    assert 1 <= len(passes) <= 3


original = forward.capture


def test_harvesting_ahead_spreads_a_block_over_the_batches_of_the_one_before(make_stream, monkeypatch):
    passes = []
    monkeypatch.setattr(forward, "capture", lambda *a, **k: passes.append(1) or original(*a, **k))
    counts = {}
    for ahead in (False, True):
        made = make_stream(batch_size=10, block_tokens=100, lm_batch_size=1, ahead=ahead)
        counts[ahead] = []
        for _ in range(40):
            passes.clear()
            next(made)
            counts[ahead].append(len(passes))
    # A block of 100 tokens is seven or eight windows: read at once, or one or two for each of its ten batches.
    assert max(counts[False][1:]) >= 7
    assert max(counts[True][1:]) <= 2
    assert sum(counts[True]) >= sum(counts[False])


@pytest.mark.parametrize(("ahead", "blocks_told"), [(False, 3), (True, 1)])
def test_who_waits_for_a_block_is_told_how_far_it_is(make_stream, ahead, blocks_told):
    """After every pass; of blocks that are made beside the batches before them nobody waits."""
    told = []
    made = make_stream(batch_size=10, block_tokens=100, lm_batch_size=1, ahead=ahead)
    made.on_read = lambda done, total: told.append((done, total))
    for _ in range(30):
        next(made)
    assert {total for _, total in told} == {100}
    ends = [number for number, (done, _) in enumerate(told) if done == 100]
    assert len(ends) == blocks_told
    for begin, end in pairwise([-1, *ends]):
        done = [one for one, _ in told[begin + 1 : end + 1]]
        assert done == sorted(set(done))
        assert len(done) >= 6  # windows of 16 tokens, some of which do not count


@pytest.mark.parametrize("ahead", [False, True])
def test_an_interrupted_harvest_leaves_the_state_of_the_last_batch(make_stream, monkeypatch, ahead):
    expected = list(make_stream())
    calls = []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(forward, "capture", interrupted)
    made, seen = make_stream(ahead=ahead), []
    with pytest.raises(KeyboardInterrupt):
        seen.extend(made)  # extend keeps what came before the interrupt
    resumed = make_stream()
    resumed.load_state_dict(made.state_dict())
    rest = list(resumed)
    assert 0 < len(seen) < len(expected)
    assert all(torch.equal(a[LAYER], b[LAYER]) for a, b in zip(seen + rest, expected, strict=True))


@pytest.mark.parametrize("sites", [["layers.0.mlp", "embeddings"], ["embeddings", "layers.0.mlp"]])
def test_outliers_at_any_site_are_dropped_and_counted(make_stream, lm, texts, sites):
    model = copy.deepcopy(lm)
    model.model.embed_tokens.weight.data[4 + 7] *= 1000
    count = " ".join(texts[:60]).split().count("w7")
    total = sum(len(text.split()) for text in texts[:60])
    # The MLP reads a normalised input, so w7 is an outlier at the embeddings only.
    places = [resolve_site(model, site) for site in sites]
    limits = find_norm_limits(model, places, make_stream(model, sites).windows)
    made = make_stream(model, sites, batch_size=1, norm_limits=limits)
    norms = torch.cat([batch[EMBEDDINGS] for batch in made]).norm(dim=1)
    assert count > 5
    assert made.num_filtered == count
    assert len(norms) == total - count
    assert norms.max() < 10 * norms.median()
    unfiltered = make_stream(model, batch_size=1)
    assert len(list(unfiltered)) == total
    assert unfiltered.num_filtered == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_named(make_stream, lm, value):
    model = copy.deepcopy(lm)
    model.model.embed_tokens.weight.data[4 + 7] = value
    message = r"activations at model\.embed_tokens:output in block 0 are NaN or infinite .*bfloat16 or float32"
    with pytest.raises(ActivationError, match=message):
        next(make_stream(model))


def test_dtype_is_the_models_own(make_stream, lm):
    batch = next(make_stream(copy.deepcopy(lm).to(torch.bfloat16)))
    assert {rows.dtype for rows in batch.values()} == {torch.bfloat16}
    assert not any(rows.requires_grad for rows in batch.values())


def test_the_model_is_left_as_it_was(make_stream, lm):
    before = {name: value.clone() for name, value in lm.state_dict().items()}
    hooks = [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in lm.modules()]
    list(make_stream())
    assert [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in lm.modules()] == hooks
    assert all(torch.equal(before[name], value) for name, value in lm.state_dict().items())


def test_bad_arguments_name_what_was_given(make_stream, lm):
    with pytest.raises(ValueError, match=r"training mode.*model\.eval\(\)"):
        make_stream(copy.deepcopy(lm).train())
    with pytest.raises(ValueError, match="training mode"):
        next(harvest(copy.deepcopy(lm).train(), [LAYER], [], lm_batch_size=1))
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        make_stream(batch_size=0)
    with pytest.raises(ValueError, match="norm_outlier_multiple must be above 1"):
        find_norm_limits(lm, [LAYER], [], multiple=0.5)
    with pytest.raises(ValueError, match="name at least one site"):
        make_stream(sites=[])
    with pytest.raises(DatasetError, match=r"the data ends after 2 activations, fewer than one batch of 32"):
        list(make_stream(documents=["w1 w2"]))
    with pytest.raises(ValueError, match="'seed': 1"):
        make_stream(seed=1).load_state_dict(make_stream().state_dict())


def test_a_real_model_gives_each_word_of_the_stories(stories260k, shared_data):
    lm, tokenizer = stories260k
    lm = copy.deepcopy(lm).double()  # so that rounding cannot change the order in which rows are compared
    stories = (shared_data / "tinystories.txt").read_text(encoding="utf-8")[:8_000].split("<|endoftext|>")
    found = TokenWindows(stories, tokenizer, context_length=128)
    made = ActivationStream(lm, ["layers.2"], found, batch_size=1, block_tokens=2000)
    given_out = torch.cat([batch[made.sites[0]] for batch in made])
    kept = []
    for window in TokenWindows(stories, tokenizer, context_length=128):
        with torch.no_grad():
            hidden = lm(window.input_ids[None], output_hidden_states=True).hidden_states[3]
        kept.append(hidden[0, window.keep])
    torch.testing.assert_close(in_order(given_out), in_order(torch.cat(kept)), rtol=0, atol=1e-6)
    assert len(given_out) > 3000


@pytest.mark.slow  # all operations pass through Python
@pytest.mark.parametrize("pack", [True, False])
def test_passes_are_asked_for_ahead_without_waiting(make_stream, lm, pack):
    """A GPU is waited for where a block begins, to see whether its activations are finite, and for single windows."""
    with pretended_cuda() as gpu:
        stream = make_stream(copy.deepcopy(lm).to(DEVICE), pack=pack, batch_size=8, lm_batch_size=3)
        next(stream)
        sizes = []
        for _ in range(40):
            gpu.clear()
            block, ahead = stream._current, stream._next
            done = 0 if ahead is None else ahead.done
            next(stream)
            if stream._current is block:
                asked = stream._next.passes[done : stream._next.done]
                sizes += map(len, asked)
                assert len(gpu.syncs) == sum(len(windows) == 1 for windows in asked), list(map(str, gpu.syncs))
        assert sizes.count(3) >= 5


@pytest.mark.slow  # all operations pass through Python
@pytest.mark.parametrize("num_parts", [None, 1, 2])
def test_a_model_that_processes_run_together_shares_the_stream_of_the_training(
    make_stream, lm, monkeypatch, num_parts
):
    """On a stream of its own its sums and those of the training would be in another order on each device."""
    entered = []
    with pretended_cuda():
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: entered.append(stream) or nullcontext())
        model = copy.deepcopy(lm).to(DEVICE)
        monkeypatch.setattr(model, "_tp_size", num_parts)
        stream = make_stream(model)
        there = [next(stream)[LAYER].cpu() for _ in range(9)]
        assert stream.ahead
    assert bool(entered) == (num_parts != 2)
    here = make_stream()
    assert torch.equal(torch.cat(there), torch.cat([next(here)[LAYER] for _ in range(9)]))
