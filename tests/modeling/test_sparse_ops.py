"""The sparse path against the dense reference, written out here: selection, losses, every gradient."""

from itertools import pairwise

import pytest
import torch
from hf_msae.modeling import sparse_encoder, sparse_ops
from hf_msae.modeling.dense_ops import InnerShares
from hf_msae.modeling.objective import POWER_FLOOR
from hf_msae.modeling.sparse_encoder import select_exceeding, select_largest, select_largest_per_token
from hf_msae.modeling.sparse_ops import GradientMemory
from hypothesis import given, settings
from hypothesis import strategies as st
from tied_selection import TIES, check_ties
from torch import Tensor

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig

properties = settings(max_examples=30, deadline=None, derandomize=True)
# Numbers of a tile, and its most tokens.
TILES = st.tuples(st.sampled_from([1, 64, 1 << 20]), st.sampled_from([1, 5, 1 << 11]))
ACTIVATIONS = ("batch_topk", "topk", "jumprelu", "relu")


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def dense_largest(x: Tensor, W_enc: Tensor, b_enc: Tensor, count: int) -> set[tuple[int, int]]:
    pre = x @ W_enc.T + b_enc
    places = pre.flatten().topk(min(count, pre.numel())).indices
    places = places[pre.flatten()[places] > 0]
    return {divmod(int(place), pre.shape[1]) for place in places}


@given(
    tokens=st.integers(1, 30),
    num_latents=st.integers(1, 70),
    k=st.integers(1, 8),
    shift=st.sampled_from([-3.0, 0.0, 3.0]),
    tile=TILES,
    samples=st.sampled_from([2, 16, 1 << 18]),
    bias_inside=st.booleans(),
    seed=st.integers(0, 1000),
)
@properties
def test_selection_is_topks_whatever_the_tiles_and_samples(
    tokens, num_latents, k, shift, tile, samples, bias_inside, seed
):
    """Also where the guessed threshold is far off: two samples say little, tiles of one pre-activation less."""
    x, W_enc = draw(tokens, 5, seed=seed), draw(num_latents, 5, seed=seed + 1)
    b_enc = draw(num_latents, seed=seed + 2) + shift
    count = k * tokens
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse_encoder, "CPU_TILE", tile[0])
        patch.setattr(sparse_encoder, "CPU_TILE_TOKENS", tile[1])
        patch.setattr(sparse_encoder, "SAMPLES", samples)
        patch.setattr(sparse_encoder, "_product_takes_bias", lambda x: bias_inside)
        active = select_largest(x, W_enc, b_enc, count)
    assert set(zip(active.tokens.tolist(), active.latents.tolist(), strict=True)) == dense_largest(
        x, W_enc, b_enc, count
    )
    pre = x @ W_enc.T + b_enc
    torch.testing.assert_close(active.values, pre[active.tokens, active.latents])
    order = active.tokens * num_latents + active.latents
    assert torch.equal(order, order.sort().values)


@pytest.mark.parametrize("loud", ["tokens", "latents"])
def test_a_misleading_first_tile_is_noticed(loud, monkeypatch):
    """The first tile's tokens or latents are large, so the threshold guessed from them is above most of what must be
    kept.
    """
    monkeypatch.setattr(sparse_encoder, "CPU_TILE", 128)
    monkeypatch.setattr(sparse_encoder, "CPU_TILE_TOKENS", 4 if loud == "tokens" else 40)
    x, W_enc, b_enc = draw(40, 6, seed=0), draw(32, 6, seed=1), torch.zeros(32, dtype=torch.float64)
    if loud == "tokens":
        x[:4] *= 100
    else:
        assert sparse_encoder.tile_shape(40, 32, x.device) == (40, 10)
        W_enc[::10] *= 100
    active = select_largest(x, W_enc, b_enc, 60)
    assert active.tokens.numel() == 60
    assert set(zip(active.tokens.tolist(), active.latents.tolist(), strict=True)) == dense_largest(x, W_enc, b_enc, 60)


def test_ties_keep_the_count():
    x, W_enc, b_enc = torch.ones(6, 3), torch.ones(20, 3), torch.zeros(20)
    active = select_largest(x, W_enc, b_enc, 17)
    assert active.tokens.numel() == 17
    assert torch.equal(active.values, torch.full((17,), 3.0))


@given(**TIES)
@properties
def test_of_equal_pre_activations_the_first_are_selected(**batch):
    check_ties(**batch)


def test_nothing_positive_selects_nothing():
    x, W_enc = draw(6, 3, seed=0), torch.zeros(20, 3, dtype=torch.float64)
    b_enc = torch.full((20,), -1.0, dtype=torch.float64)
    for active in (
        select_largest(x, W_enc, b_enc, 17),
        select_largest_per_token(x, W_enc, b_enc, 3),
        select_exceeding(x, W_enc, b_enc, torch.zeros(20, dtype=torch.float64)),
    ):
        assert [part.numel() for part in active] == [0, 0, 0]


@given(
    tokens=st.integers(1, 12),
    num_latents=st.integers(1, 90),
    k=st.integers(1, 9),
    tile=TILES,
    cached=st.sampled_from([0, 1 << 20]),
    loud=st.sampled_from([1.0, 30.0]),
    seed=st.integers(0, 1000),
)
@properties
def test_per_token_selection_is_topks_whatever_the_tiles(tokens, num_latents, k, tile, cached, loud, seed):
    """Also where the first tile's latents are so large that its threshold hides the others' largest."""
    x, W_enc, b_enc = draw(tokens, 4, seed=seed), draw(num_latents, 4, seed=seed + 1), draw(num_latents, seed=seed + 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse_encoder, "CPU_TILE", tile[0])
        patch.setattr(sparse_encoder, "CPU_TILE_TOKENS", tile[1])
        patch.setattr(sparse_encoder, "CACHED_WEIGHTS", cached)
        W_enc[:: sparse_encoder.tile_shape(tokens, num_latents, x.device)[1]] *= loud
        active = select_largest_per_token(x, W_enc, b_enc, k)
    pre = torch.relu(x @ W_enc.T + b_enc)
    values, indices = pre.topk(min(k, num_latents), dim=-1)
    expected = torch.zeros_like(pre).scatter(-1, indices, values)
    torch.testing.assert_close(active.to_dense(tokens, num_latents), expected)
    order = active.tokens * num_latents + active.latents
    assert torch.equal(order, order.sort().values)


@given(tokens=st.integers(1, 30), num_latents=st.integers(1, 70), tile=TILES, seed=st.integers(0, 1000))
@properties
def test_what_exceeds_thresholds_is_found_whatever_the_tiles(tokens, num_latents, tile, seed):
    x, W_enc, b_enc = draw(tokens, 5, seed=seed), draw(num_latents, 5, seed=seed + 1), draw(num_latents, seed=seed + 2)
    threshold = draw(num_latents, seed=seed + 3).abs()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse_encoder, "CPU_TILE", tile[0])
        patch.setattr(sparse_encoder, "CPU_TILE_TOKENS", tile[1])
        patch.setattr(sparse_encoder, "dense_share", lambda device: 1.0)
        active = select_exceeding(x, W_enc, b_enc, threshold)
    assert active is not None
    pre = x @ W_enc.T + b_enc
    torch.testing.assert_close(active.to_dense(tokens, num_latents), pre.where(pre > threshold, 0))
    order = active.tokens * num_latents + active.latents
    assert torch.equal(order, order.sort().values)


def test_too_many_to_be_worth_it():
    x, W_enc, b_enc = draw(50, 4, seed=0), draw(100, 4, seed=1), torch.zeros(100, dtype=torch.float64)
    pre = x @ W_enc.T
    threshold = torch.full((100,), float(pre.flatten().quantile(1 - sparse_encoder.CPU_DENSE_SHARE - 0.01)))
    assert select_exceeding(x, W_enc, b_enc, threshold) is None
    threshold.fill_(float(pre.flatten().quantile(1 - sparse_encoder.CPU_DENSE_SHARE + 0.01)))
    active = select_exceeding(x, W_enc, b_enc, threshold)
    assert active is not None
    assert torch.equal(active.to_dense(50, 100) > 0, pre > threshold)


# The whole loss and every gradient


def make(activation: str, sizes: list[int], hidden_size: int, seed: int, **options) -> MatryoshkaSAE:
    config = MatryoshkaSAEConfig(
        hidden_size=hidden_size, num_latents=sizes[-1], prefix_sizes=sizes, k=2, activation=activation, **options
    )
    sae = MatryoshkaSAE(config).double().train()
    with torch.no_grad():
        for number, parameter in enumerate((sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec)):
            parameter.copy_(draw(*parameter.shape, seed=seed + number))
        sae.threshold.data = draw(sizes[-1], seed=seed + 9).abs() if activation == "jumprelu" else sae.threshold.data
    return sae


def reference(sae: MatryoshkaSAE, x: Tensor, variance: float) -> Tensor:
    """The loss by dense products, in a few lines, from the formulas alone."""
    config = sae.config
    pre = (x - sae.b_dec if config.apply_b_dec_to_input else x) @ sae.W_enc.T + sae.b_enc
    scale = (variance / config.hidden_size) ** 0.5
    penalty = 0.0
    if config.activation == "batch_topk":
        values, places = torch.relu(pre).flatten().topk(int(config.k) * len(x))
        f = torch.zeros_like(pre).flatten().scatter(0, places, values).view_as(pre)
    elif config.activation == "topk":
        values, places = torch.relu(pre).topk(int(config.k), -1)
        f = torch.zeros_like(pre).scatter(-1, places, values)
    elif config.activation == "relu":
        f = torch.relu(pre)
        units = f * sae.W_dec.norm(dim=-1) / (scale * config.hidden_size**0.5)
        powers = units if config.p_end == 1 else (units[f > 0] + POWER_FLOOR) ** config.p_end
        penalty = powers.sum() / len(x)
    else:
        width = config.jumprelu_bandwidth * scale
        gate = (pre > sae.threshold).double()
        near = ((pre - sae.threshold).abs() < width / 2).double() / width
        # Straight through: the value is the gate's, the gradient for the threshold that of a ramp of this width.
        gate = gate - near.detach() * (sae.threshold - sae.threshold.detach())
        f = pre * (pre > sae.threshold) + sae.threshold.detach() * (gate - gate.detach())
        penalty = (gate.sum() / (len(x) * config.k) - 1) ** 2
    loss = config.sparsity_weight * penalty
    if not config.detach_prefixes:
        return loss + inner_levels_with_shares(sae, x, f, variance)
    low, reconstruction = 0, sae.b_dec.expand_as(x)
    for size, weight in zip(config.prefix_sizes, config.normalized_level_weights, strict=True):
        before = reconstruction.detach() if low else reconstruction
        reconstruction = before + f[:, low:size] @ sae.W_dec[low:size]
        loss = loss + weight * (x - reconstruction).pow(2).sum(-1).mean() / variance
        low = size
    return loss


def inner_levels_with_shares(sae: MatryoshkaSAE, x: Tensor, f: Tensor, variance: float) -> Tensor:
    """The levels' errors, of whose gradient a share reaches decoder and latent activations, but for the last."""
    config, loss = sae.config, torch.zeros((), dtype=x.dtype)

    def passing(tensor: Tensor, share: float) -> Tensor:
        return share * tensor + (1 - share) * tensor.detach()

    for size, weight in zip(config.prefix_sizes, config.normalized_level_weights, strict=True):
        inner = size < config.num_latents
        of_latents, of_decoder = (config.inner_activation_share, config.inner_decoder_share) if inner else (1, 1)
        product = passing(f[:, :size], of_latents) @ passing(sae.W_dec[:size], of_decoder)
        error = (x - passing(sae.b_dec, of_decoder) - product).pow(2).sum(-1).mean()
        loss = loss + weight * ((error / variance).log() if config.log_loss else error / variance)
    return loss


SHARES = st.sampled_from([0.0, 0.25, 0.7, 1.0])


@pytest.mark.parametrize(
    ("activation", "path"), [*((name, "sparse") for name in ACTIVATIONS), ("relu", "dense"), ("jumprelu", "dense")]
)
@given(
    sizes=st.lists(st.integers(3, 60), min_size=1, max_size=8, unique=True).map(sorted),
    tokens=st.integers(1, 9),
    hidden_size=st.integers(1, 7),
    shares=st.tuples(SHARES, SHARES),
    balance=st.sampled_from([None, 0.5]),
    log_loss=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=12, deadline=None, derandomize=True)
def test_shares_of_inner_gradients_are_those_of_the_formula(
    activation, path, sizes, tokens, hidden_size, shares, balance, log_loss, seed
):
    """Both paths, any shares: the loss stays, and every gradient is what autograd makes of the formula."""
    options = {"inner_decoder_share": shares[0], "inner_activation_share": shares[1], "sparsity_weight": 0.3}
    sae = make(activation, sizes, hidden_size, seed, balance=balance, log_loss=log_loss, **options)
    x = draw(tokens, hidden_size, seed=seed + 20).requires_grad_()
    inputs = [x, *sae.parameters()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse_encoder, "dense_share", lambda device: 1.0 if path == "sparse" else -1.0)
        output = sae(x, variance=1.0)
        whole = sae(x, variance=1.0, inner_shares=InnerShares())
    assert (output.active is None) == (path == "dense")
    assert output.loss.item() == whole.loss.item()
    expected = reference(sae, x, 1.0)
    torch.testing.assert_close(output.loss, expected, rtol=1e-10, atol=1e-10)
    ours = torch.autograd.grad(output.loss, inputs, allow_unused=True)
    theirs = torch.autograd.grad(expected, inputs, allow_unused=True)
    for one, other, tensor in zip(ours, theirs, inputs, strict=True):
        one, other = (torch.zeros_like(tensor) if grad is None else grad for grad in (one, other))
        torch.testing.assert_close(one.to(tensor.dtype), other.to(tensor.dtype), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@given(
    sizes=st.lists(st.integers(3, 60), min_size=1, max_size=8, unique=True).map(sorted),
    tokens=st.integers(1, 9),
    hidden_size=st.integers(1, 7),
    detach=st.booleans(),
    apply_b_dec=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=12, deadline=None, derandomize=True)
def test_loss_and_gradients_are_the_dense_ones(activation, sizes, tokens, hidden_size, detach, apply_b_dec, seed):
    options = {"detach_prefixes": detach, "apply_b_dec_to_input": apply_b_dec, "sparsity_weight": 0.3}
    sae = make(activation, sizes, hidden_size, seed, **options)
    x = draw(tokens, hidden_size, seed=seed + 20).requires_grad_()
    inputs = [x, *sae.parameters()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse_encoder, "dense_share", lambda device: 1.0)
        output = sae(x, variance=1.7)
    assert output.active is not None
    expected = reference(sae, x, 1.7)
    torch.testing.assert_close(output.loss, expected, rtol=1e-10, atol=1e-10)
    ours = torch.autograd.grad(output.loss, inputs, allow_unused=True)
    theirs = torch.autograd.grad(expected, inputs, allow_unused=True)
    for one, other in zip(ours, theirs, strict=True):
        assert one is not None
        torch.testing.assert_close(one, torch.zeros_like(one) if other is None else other, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("path", ["sparse", "dense"])
@given(
    sizes=st.lists(st.integers(3, 60), min_size=1, max_size=8, unique=True).map(sorted),
    tokens=st.integers(1, 9),
    hidden_size=st.integers(1, 7),
    p=st.floats(0.05, 1),
    seed=st.integers(0, 1000),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_the_penalty_of_any_power_is_that_of_the_formula(path, sizes, tokens, hidden_size, p, seed):
    """Both paths, loss and gradients, the zeros' among them; and a step's p takes the configuration's place."""
    sae = make("relu", sizes, hidden_size, seed, p_end=p, sparsity_weight=0.3)
    l1 = make("relu", sizes, hidden_size, seed, sparsity_weight=0.3)
    x = draw(tokens, hidden_size, seed=seed + 20).requires_grad_()
    inputs = [x, *sae.parameters()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse_encoder, "dense_share", lambda device: 1.0 if path == "sparse" else -1.0)
        output, other = sae(x, variance=1.7), l1(x, variance=1.7, sparsity_p=p)
        assert sae(x, variance=1.7, sparsity_p=1).loss.item() == l1(x, variance=1.7).loss.item()
    assert (output.active is None) == (path == "dense")
    assert output.loss.item() == other.loss.item()
    expected = reference(sae, x, 1.7)
    torch.testing.assert_close(output.loss, expected, rtol=1e-10, atol=1e-10)
    theirs = torch.autograd.grad(expected, inputs, allow_unused=True)
    for one, its in zip(torch.autograd.grad(output.loss, inputs), theirs, strict=True):
        torch.testing.assert_close(one, torch.zeros_like(one) if its is None else its, rtol=1e-9, atol=1e-10)
    given = (output.active, None if path == "sparse" else output.latents)
    measured = l1.sparsity_at(*given, tokens, 1.7, p)
    if p < 1:
        torch.testing.assert_close(measured, output.sparsity_loss, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("block", [1, 40, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_in_kept_memory_are_the_same_and_lie_where_the_last_ones_lay(monkeypatch, block, dtype):
    """Also for latents that were active before and are not now, and for a gradient that is added to another."""
    monkeypatch.setattr(sparse_ops, "GRADIENT_BLOCK", block)
    plain = make("batch_topk", [8, 24, 64], 6, seed=2).to(dtype)
    kept = make("batch_topk", [8, 24, 64], 6, seed=2).to(dtype)
    kept.gradient_memory = GradientMemory()
    batches = [draw(20, 6, seed=number, dtype=dtype) for number in range(5)]
    places = set()
    for first, second in pairwise(batches):
        for sae in (plain, kept):
            for x in (first, second):
                sae(x).loss.backward()
        for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
            assert torch.equal(getattr(plain, name).grad, getattr(kept, name).grad), name
        places.add(kept.W_enc.grad.data_ptr())
        plain.zero_grad()
        kept.gradient_memory.keep(kept.parameters())
        assert kept.W_enc.grad is None
    assert len(places) == 1


@pytest.mark.parametrize("activation", ["batch_topk", "relu"])
def test_gradcheck(activation, monkeypatch):
    """Finite differences; the selection is far from changing."""
    monkeypatch.setattr(sparse_encoder, "dense_share", lambda device: 1.0)
    sae = make(activation, [2, 5, 11], 4, seed=3)
    x = draw(3, 4, seed=30).requires_grad_()
    parameters = dict(sae.named_parameters())

    def loss(x: Tensor, *values: Tensor) -> Tensor:
        changed = dict(zip(parameters, values, strict=True))
        return torch.func.functional_call(sae, changed, (x,), {"variance": 2.0}).loss

    assert torch.autograd.gradcheck(loss, (x, *parameters.values()), eps=1e-7, atol=1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_inference_is_the_dense_one(activation, monkeypatch):
    """Evaluation without gradients takes the sparse path, with gradients the dense one; they agree."""
    monkeypatch.setattr(sparse_encoder, "dense_share", lambda device: 1.0)
    sae = make(activation, [8, 300, 900], 6, seed=1).eval()
    with torch.no_grad():
        sae.b_enc.sub_(6.0)
        sae.threshold.fill_(0.0 if activation == "relu" else 1.0)
    x = draw(2, 25, 6, seed=5)
    dense = sae(x)
    with torch.no_grad():
        sparse = sae(x)
    assert dense.active is None
    assert sparse.active is not None
    for name in ("loss", "reconstruction", "latents", "level_losses"):
        torch.testing.assert_close(dense[name], sparse[name], rtol=1e-10, atol=1e-10)
    assert (sparse.latents > 0).sum() == sparse.active.values.numel() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_precisions_follow(dtype):
    sae = make("batch_topk", [8, 40], 6, seed=2).to(dtype)
    x = draw(30, 6, seed=6).to(dtype)
    output = sae(x)
    output.loss.backward()
    exact = make("batch_topk", [8, 40], 6, seed=2)
    expected = exact(draw(30, 6, seed=6))
    expected.loss.backward()
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(output.loss.double(), expected.loss, rtol=tolerance, atol=tolerance)
    agreement = torch.cosine_similarity(sae.W_dec.grad.double().flatten(), exact.W_dec.grad.flatten(), dim=0)
    assert agreement > 1 - tolerance


def test_two_hundred_steps_as_by_the_dense_path(monkeypatch):
    """A training run by each path, the same losses to float tolerance."""
    losses = {}
    for path in ("sparse", "dense"):
        torch.manual_seed(0)
        sae = MatryoshkaSAE(MatryoshkaSAEConfig(hidden_size=12, num_latents=64, prefix_sizes=[8, 24, 64], k=3)).train()
        optimizer = torch.optim.Adam(sae.parameters(), lr=3e-3)
        history = []
        for step in range(200):
            x = draw(64, 12, seed=step, dtype=torch.float32)
            loss = sae(x, variance=12.0).loss if path == "sparse" else reference(sae, x, 12.0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append(loss.item())
        losses[path] = torch.tensor(history)
    torch.testing.assert_close(losses["sparse"], losses["dense"], rtol=1e-4, atol=1e-5)
    assert losses["sparse"][-1] < 0.8 * losses["sparse"][0]
