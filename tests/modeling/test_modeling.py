"""The model: its loss against an independent computation, prefixes against truncation, files against memory."""

import copy
import io
import math
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig

properties = settings(max_examples=25, deadline=None, derandomize=True)
ACTIVATIONS = ["batch_topk", "topk", "jumprelu", "relu"]
SIZES = [8, 16, 40]
WIDTH = 12
THRESHOLDED = ["batch_topk", "topk", "jumprelu"]


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_sae(activation: str = "batch_topk", seed: int = 0, **change) -> MatryoshkaSAE:
    """A model in training mode whose tensors all differ from each other and from what initialisation gives."""
    values = {"hidden_size": WIDTH, "num_latents": 40, "prefix_sizes": SIZES, "k": 4, "activation": activation}
    torch.manual_seed(seed)
    sae = MatryoshkaSAE(MatryoshkaSAEConfig(**{**values, **change}))
    with torch.no_grad():
        sae.W_enc.add_(0.2 * torch.randn_like(sae.W_enc))
        sae.b_enc.copy_(0.1 * torch.randn_like(sae.b_enc))
        sae.b_dec.copy_(torch.randn_like(sae.b_dec))
        if activation != "relu":
            sae.threshold.copy_(0.4 + torch.rand_like(sae.threshold))
        sae.max_activation.copy_(torch.rand_like(sae.max_activation) + 3)
        sae.firing_rate.copy_(torch.rand_like(sae.firing_rate))
    return sae.train()


def make_x(*shape: int, seed: int = 1) -> Tensor:
    return random(*(shape or (64, WIDTH)), seed=seed) * 2 + random(WIDTH, seed=100)


def gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


# The reference: definitions written out, sharing no code with the model.


def reference_latents(sae: MatryoshkaSAE, x: Tensor) -> Tensor:
    """Latent activations (B, F) in training mode."""
    pre = torch.einsum("fd,bd->bf", sae.W_enc, x - sae.b_dec) + sae.b_enc
    activation, k = sae.config.activation, sae.config.k
    if activation == "relu":
        return pre.clamp(min=0)
    if activation == "jumprelu":
        return pre * (pre > sae.threshold)
    if activation == "topk":
        limit = pre.sort(dim=-1, descending=True).values[:, k - 1 : k]
    else:
        limit = pre.flatten().sort(descending=True).values[round(k * len(x)) - 1]
    return pre.clamp(min=0) * (pre >= limit)


def reference_level_losses(sae: MatryoshkaSAE, x: Tensor, sizes: list[int]) -> Tensor:
    f = reference_latents(sae, x)
    variance = sum(((x[:, i] - x[:, i].mean()) ** 2).mean() for i in range(x.shape[1]))
    losses = []
    for m in sizes:
        error = x - sae.b_dec - torch.einsum("bf,fd->bd", f[:, :m], sae.W_dec[:m])
        losses.append(torch.einsum("bd,bd->b", error, error).mean() / variance)
    return torch.stack(losses)


def reference_sparsity(sae: MatryoshkaSAE, x: Tensor) -> float:
    f = reference_latents(sae, x)
    if sae.config.activation == "jumprelu":
        l0 = (f != 0).sum().item() / len(x)
        return (l0 / sae.config.k - 1) ** 2
    if sae.config.activation == "relu":
        deviation = math.sqrt(x.var(dim=0, unbiased=False).sum().item())
        return (f * sae.W_dec.norm(dim=1)).sum(1).mean().item() / deviation
    return 0.0


WEIGHTS = {
    "uniform": ({}, [1 / 3, 1 / 3, 1 / 3]),
    "size": ({"level_weights": "size"}, [8 / 40, 8 / 40, 24 / 40]),
    "custom": ({"level_weights": [3, 0, 1]}, [0.75, 0, 0.25]),
    "balance": ({"balance": 0.5}, [1 / 7, 2 / 7, 4 / 7]),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("change", "weights"), WEIGHTS.values(), ids=WEIGHTS.keys())
def test_loss_is_the_weighted_sum_of_levels_over_the_variance(
    activation: str, change: dict, weights: list[float]
) -> None:
    sae, x = make_sae(activation, **change), make_x()
    output = sae(x)
    levels = reference_level_losses(sae, x, SIZES)
    sparsity = reference_sparsity(sae, x)
    torch.testing.assert_close(output.level_losses, levels.detach(), rtol=1e-5, atol=1e-6)
    assert output.sparsity_loss.item() == pytest.approx(sparsity, rel=1e-4)
    expected = sum(w * level.item() for w, level in zip(weights, levels, strict=True)) + 0.01 * sparsity
    assert output.loss.item() == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(output.latents, reference_latents(sae, x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.reconstruction, sae.decode(output.latents), rtol=1e-5, atol=1e-5)
    assert output.aux_loss.item() == 0


def test_loss_gradients_equal_those_of_the_reference() -> None:
    sae, x = make_sae(level_weights=[1, 2, 3]), make_x()
    parameters = [sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec]
    got = torch.autograd.grad(sae(x).loss, parameters)
    loss = (reference_level_losses(sae, x, SIZES) * torch.tensor([1, 2, 3]) / 6).sum()
    for mine, expected in zip(got, torch.autograd.grad(loss, parameters), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-6)


def test_log_loss_takes_the_logarithm_of_each_level() -> None:
    sae, x = make_sae(log_loss=True, level_weights=[1, 1, 2]), make_x()
    output = sae(x)
    expected = (reference_level_losses(sae, x, SIZES).log() * torch.tensor([0.25, 0.25, 0.5])).sum()
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(output.level_losses, sae.train()(x).level_losses)
    assert output.level_losses.min() > 0


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_weight_on_the_last_level_only_is_the_plain_sae(activation: str) -> None:
    nested, plain = make_sae(activation, level_weights=[0, 0, 1]), make_sae(activation, prefix_sizes=[40])
    plain.load_state_dict(nested.state_dict())
    x = make_x()
    ours, theirs = nested(x), plain(x)
    assert ours.loss.item() == pytest.approx(theirs.loss.item(), abs=1e-6)
    assert theirs.level_losses.shape == (1,)
    ours.loss.backward()
    theirs.loss.backward()
    for (name, parameter), other in zip(nested.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_detached_prefixes_leave_the_loss_and_change_the_gradient() -> None:
    x = make_x()
    joint, detached = make_sae(), make_sae(detach_prefixes=True)
    losses = [sae(x).loss for sae in (joint, detached)]
    assert losses[0].item() == pytest.approx(losses[1].item(), abs=1e-7)
    for loss in losses:
        loss.backward()
    # The last group appears in the last level alone, with or without detaching.
    torch.testing.assert_close(gradient(joint.W_dec)[16:], gradient(detached.W_dec)[16:])
    assert (gradient(joint.W_dec)[:8] - gradient(detached.W_dec)[:8]).abs().max() > 1e-3


def test_sampled_prefixes_replace_the_levels_of_one_step() -> None:
    sae, x = make_sae(prefix_sampling="pareto"), make_x()
    output = sae(x, prefix_sizes=[3, 17, 18, 40])
    levels = reference_level_losses(sae, x, [3, 17, 18, 40])
    torch.testing.assert_close(output.level_losses, levels.detach(), rtol=1e-5, atol=1e-6)
    assert output.loss.item() == pytest.approx(levels.mean().item(), rel=1e-5)


@pytest.mark.parametrize("sizes", [[], [0, 40], [17, 3, 40], [8, 8, 40], [8, 16], [8, 41]])
def test_sampled_prefixes_must_be_nested_and_end_in_the_whole(sizes: list[int]) -> None:
    with pytest.raises(ValueError, match=r"strictly increasing and end in num_latents=40, got \["):
        make_sae()(make_x(), prefix_sizes=sizes)


def test_arguments_of_one_step_replace_those_of_the_configuration() -> None:
    x = make_x()
    sae = make_sae("relu")
    output = sae(x, sparsity_weight=0.5, variance=2.0)
    expected = output.level_losses.mean() + 0.5 * output.sparsity_loss
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    own = x.var(dim=0, unbiased=False).sum()
    torch.testing.assert_close(output.level_losses, sae(x).level_losses * own / 2.0, rtol=1e-5, atol=1e-6)
    assert int((make_sae()(x, k=2.5).latents > 0).sum()) == round(2.5 * 64)


@pytest.mark.parametrize("activation", ["batch_topk", "topk", "relu"])
@given(exponent=st.integers(-3, 3))
@settings(max_examples=4, deadline=None, derandomize=True)
def test_loss_does_not_depend_on_the_scale_of_the_activations(activation: str, exponent: int) -> None:
    scale = 10.0**exponent
    sae, scaled, x = make_sae(activation), make_sae(activation), make_x()
    with torch.no_grad():
        scaled.b_enc.mul_(scale)
        scaled.b_dec.mul_(scale)
    assert scaled(x * scale).loss.item() == pytest.approx(sae(x).loss.item(), rel=1e-5)


def test_jumprelu_does_not_depend_on_scale_either_thresholds_and_their_gradient_included() -> None:
    sae, scaled, x = make_sae("jumprelu"), make_sae("jumprelu"), make_x()
    with torch.no_grad():
        for tensor in (scaled.b_enc, scaled.b_dec, scaled.threshold):
            tensor.mul_(10)
    losses = sae(x).loss, scaled(x * 10).loss
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-5)
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(gradient(scaled.threshold) * 10, gradient(sae.threshold), rtol=1e-3, atol=1e-5)
    assert gradient(sae.threshold).abs().max() > 0


def test_a_fresh_model_at_the_mean_does_not_depend_on_scale() -> None:
    sae, x = MatryoshkaSAE(MatryoshkaSAEConfig(hidden_size=WIDTH, num_latents=40, k=4)).train(), make_x()
    losses = []
    for scale in (1, 10):
        sae.b_dec.data = (x * scale).mean(0)
        losses.append(sae(x * scale).loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_initialisation_is_unit_rows_and_a_tied_encoder() -> None:
    sae = MatryoshkaSAE(MatryoshkaSAEConfig(hidden_size=WIDTH, num_latents=40, k=4))
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(40))
    assert torch.equal(sae.W_enc, sae.W_dec)
    assert (sae.W_dec @ sae.W_dec.T - torch.eye(40)).abs().max() < 0.95
    for tensor in (sae.b_enc, sae.b_dec, sae.threshold, sae.max_activation, sae.firing_rate):
        assert not tensor.any()


# The auxiliary loss


def test_auxiliary_loss_is_the_residual_left_to_dead_latents() -> None:
    sae, x = make_sae(num_aux_latents=3, aux_loss_weight=0.25), make_x()
    dead = torch.zeros(40, dtype=torch.bool)
    dead[[2, 9, 20, 21, 33]] = True
    output = sae(x, dead_latents=dead)
    residual = x - output.reconstruction
    pre = torch.einsum("fd,bd->bf", sae.W_enc, x - sae.b_dec) + sae.b_enc
    pre = pre.masked_fill(~dead, -torch.inf)
    limit = pre.sort(dim=1, descending=True).values[:, 2:3]
    f = pre.clamp(min=0) * (pre >= limit)
    error = (residual - torch.einsum("bf,fd->bd", f, sae.W_dec)).pow(2).sum(1).mean()
    variance = x.var(dim=0, unbiased=False).sum()
    assert output.aux_loss.item() == pytest.approx((error / variance).item(), rel=1e-5)
    assert output.loss.item() == pytest.approx(sae(x).loss.item() + 0.25 * (error / variance).item(), rel=1e-5)


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize("num_aux_latents", [1, 7, 60])
def test_the_sparse_auxiliary_loss_is_the_dense_one(
    num_aux_latents: int, apply_b_dec_to_input: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """60 of 40 latents: every dead latent that is above zero, and none for tokens on which none is."""
    sae = make_sae(num_aux_latents=num_aux_latents, apply_b_dec_to_input=apply_b_dec_to_input).double().train()
    x = make_x().double()
    dead = torch.arange(40) % 4 != 0
    results = []
    for share in (0.0, 1e9):  # always dense, always sparse
        monkeypatch.setattr("hf_msae.modeling.objective.dense_dead_share", lambda device, share=share: share)
        inputs = x.clone().requires_grad_()
        output = sae(inputs, dead_latents=dead)
        wanted = [inputs, sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec]
        results.append([output.aux_loss, *torch.autograd.grad(output.loss, wanted)])
    assert results[0][0] > 0
    for dense, sparse in zip(*results, strict=True):
        torch.testing.assert_close(sparse, dense, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("share", [0.0, 1e9], ids=["dense", "sparse"])
@pytest.mark.parametrize("beyond", [0, 1, 30])
def test_numbers_of_dead_latents_may_be_filled_up(share: float, beyond: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is beyond the last latent stands for none, also where it would be among the strongest."""
    monkeypatch.setattr("hf_msae.modeling.objective.dense_dead_share", lambda device: share)
    sae, x = make_sae(num_aux_latents=3).double().train(), make_x().double()
    with torch.no_grad():
        sae.b_enc[-1] += 10
    mask = torch.arange(40) % 4 == 0
    results = []
    for dead in (mask, torch.nn.functional.pad(mask.nonzero().squeeze(-1), (0, beyond), value=40)):
        output = sae(x, dead_latents=dead)
        gradients = torch.autograd.grad(output.loss, [sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec])
        results.append([output.aux_loss, *gradients])
    assert results[0][0] > 0
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_auxiliary_loss_moves_dead_latents_only() -> None:
    sae, x = make_sae(), make_x()
    dead = torch.zeros(40, dtype=torch.bool)
    dead[[2, 9, 20]] = True
    parameters = [sae.W_enc, sae.b_enc, sae.W_dec]
    plain = torch.autograd.grad(sae(x).loss, parameters)
    with_aux = torch.autograd.grad(sae(x, dead_latents=dead).loss, parameters)
    for before, after in zip(plain, with_aux, strict=True):
        change = (after - before).reshape(40, -1).abs().amax(1)
        assert change[dead].min() > 1e-6
        assert change[~dead].max() < 1e-8


@pytest.mark.parametrize("change", [{}, {"aux_loss_weight": 0}])
def test_no_auxiliary_loss_without_dead_latents_or_weight(change: dict) -> None:
    sae, x = make_sae(**change), make_x()
    dead = torch.full((40,), bool(change))
    output = sae(x, dead_latents=dead)
    assert output.aux_loss.item() == 0
    assert output.loss.item() == sae(x).loss.item()


def test_half_of_hidden_size_is_the_default_number_of_aux_latents() -> None:
    x, dead = make_x(), torch.ones(40, dtype=torch.bool)
    default, six, three = (make_sae(num_aux_latents=n)(x, dead_latents=dead).aux_loss for n in (None, 6, 3))
    assert default.item() == six.item() != three.item()


# Selection


@given(tokens=st.integers(1, 40), k=st.integers(1, 12), seed=st.integers(0, 100))
@properties
def test_training_selects_exactly_k_per_token_on_average(tokens: int, k: int, seed: int) -> None:
    x = make_x(tokens, WIDTH, seed=seed)
    sae = make_sae(k=k)
    with torch.no_grad():
        # Enough positive pre-activations for every k.
        sae.b_enc.add_(20)
    for latents in (sae.encode(x), sae(x).latents):
        assert int((latents > 0).sum()) == k * tokens
    per_token = make_sae("topk", k=k)
    per_token.load_state_dict(sae.state_dict())
    assert (per_token.encode(x) > 0).sum(-1).tolist() == [k] * tokens


@pytest.mark.parametrize("activation", THRESHOLDED)
def test_evaluation_keeps_what_exceeds_the_threshold(activation: str) -> None:
    sae, x = make_sae(activation).eval(), make_x()
    pre = sae.pre_activations(x)
    torch.testing.assert_close(pre, torch.einsum("fd,bd->bf", sae.W_enc, x - sae.b_dec) + sae.b_enc)
    expected = torch.where(pre > sae.threshold, pre, 0.0)
    assert torch.equal(sae.encode(x), expected)
    assert torch.equal(sae(x).latents, expected)
    assert 0 < int((expected > 0).sum()) < expected.numel() / 2


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_in_evaluation_a_token_does_not_depend_on_its_batch(activation: str) -> None:
    sae, x = make_sae(activation).eval(), make_x()
    together = sae.encode(x)
    alone = torch.stack([sae.encode(token) for token in x])
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-5)


def test_b_dec_can_be_left_out_of_the_encoder() -> None:
    sae, x = make_sae(apply_b_dec_to_input=False), make_x()
    expected = torch.einsum("fd,bd->bf", sae.W_enc, x) + sae.b_enc
    torch.testing.assert_close(sae.pre_activations(x), expected)
    limit = expected.flatten().sort(descending=True).values[4 * 64 - 1]
    torch.testing.assert_close(sae(x).latents, torch.where(expected >= limit, expected, 0.0))


# Calibration


@pytest.mark.parametrize("activation", THRESHOLDED)
@given(exponent=st.integers(-3, 3), k=st.integers(2, 8), training=st.booleans())
@settings(max_examples=6, deadline=None, derandomize=True)
def test_calibration_meets_k(activation: str, exponent: int, k: int, training: bool) -> None:
    scale = 10.0**exponent
    sae = make_sae(activation, k=k).train(training)
    with torch.no_grad():
        for tensor in (sae.b_enc, sae.b_dec, sae.threshold):
            tensor.mul_(scale)
    before = sae.threshold.detach().clone()
    batches = [make_x(n, 100, WIDTH, seed=n) * scale for n in (50, 80, 30)]
    l0 = sae.calibrate_threshold(batches)
    active = sum(int((sae.eval().encode(batch) > 0).sum()) for batch in batches)
    assert l0 == pytest.approx(k, rel=5e-3)
    assert active / 16_000 == pytest.approx(l0, rel=1e-4)
    assert sae.threshold.min() > 0
    if activation == "jumprelu":
        ratio = sae.threshold / before
        torch.testing.assert_close(ratio, ratio[:1].expand(40), rtol=1e-5, atol=0)
        assert sae.threshold.requires_grad
    else:
        assert sae.threshold.unique().numel() == 1


def test_parts_of_a_batch_are_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reconstructions and thresholds do not depend on how many tokens are taken at once."""
    sae = MatryoshkaSAE(MatryoshkaSAEConfig(hidden_size=6, num_latents=20, prefix_sizes=[5, 20], k=3)).eval()
    x = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(0))
    l0, threshold = sae.calibrate_threshold([x]), sae.threshold.clone()
    whole = sae.decode_levels(sae.encode(x))
    monkeypatch.setattr("hf_msae.modeling.sparse_encoder.CPU_CHUNK", 3 * 4 * 20)  # three tokens at a time
    assert [part.shape[0] for part in sae.in_parts(x)] == [3] * 6 + [2]
    torch.testing.assert_close(sae.reconstruct_levels(x), whole)
    assert (sae.calibrate_threshold([x]), sae.threshold.tolist()) == (l0, threshold.tolist())


def test_calibration_starts_a_jumprelu_whose_thresholds_are_zero() -> None:
    sae = make_sae("jumprelu", k=3)
    sae.threshold.data.zero_()
    x = make_x(5000, WIDTH)
    l0 = sae.calibrate_threshold([x])
    assert l0 == pytest.approx(3, rel=5e-3)
    assert int((sae.eval().encode(x) > 0).sum()) / 5000 == pytest.approx(l0, rel=1e-4)


def test_calibration_in_bfloat16_reports_the_l0_that_results() -> None:
    sae, x = make_sae(k=4).bfloat16(), make_x(20_000, WIDTH)
    sae.threshold.data = sae.threshold.float()
    l0 = sae.calibrate_threshold([x])
    assert int((sae.eval().encode(x) > 0).sum()) / 20_000 == l0
    # Steps of bfloat16 are 0.4% of a value, and the number of latents above changes some times as fast.
    assert l0 == pytest.approx(4, rel=0.02)


def test_calibration_of_relu_measures_and_changes_nothing() -> None:
    sae, x = make_sae("relu"), make_x()
    assert sae.calibrate_threshold([x]) == int((sae.encode(x) > 0).sum()) / 64
    assert not sae.threshold.any()
    assert torch.equal(sae.encode(x), torch.relu(sae.pre_activations(x)))


def test_calibration_needs_activations() -> None:
    with pytest.raises(ValueError, match=r"got no activations; give tensors of shape \(\.\.\., hidden_size\)"):
        make_sae().calibrate_threshold([])


# Shapes


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("training", [True, False])
@given(leading=st.lists(st.integers(1, 4), min_size=0, max_size=3))
@settings(max_examples=8, deadline=None, derandomize=True)
def test_any_leading_dimensions(activation: str, training: bool, leading: list[int]) -> None:
    sae, x = make_sae(activation).train(training), make_x(*leading, WIDTH)
    flat = x.reshape(-1, WIDTH)
    latents = sae.encode(x)
    assert latents.shape == (*leading, 40)
    assert torch.equal(latents.reshape(-1, 40), sae.encode(flat))
    assert sae.encode(x, prefix=8).shape == (*leading, 8)
    decoded = sae.decode(latents)
    assert torch.equal(decoded.reshape(-1, WIDTH), sae.decode(sae.encode(flat)))
    assert decoded.shape == x.shape
    levels = sae.decode_levels(latents)
    assert levels.shape == (3, *x.shape)
    torch.testing.assert_close(levels[1], sae.decode(latents, prefix=16), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(levels[2], decoded, rtol=1e-5, atol=1e-5)
    output = sae(x, variance=1.0)
    assert output.reconstruction.shape == x.shape
    assert output.latents.shape == (*leading, 40)
    assert output.loss.shape == ()


def test_another_width_is_refused_and_the_site_named() -> None:
    sae = make_sae(site="model.layers.3:output", base_model="org/lm")
    expected = r"shape \(\.\.\., 12\), got \(5, 13\)\. This SAE reads model\.layers\.3:output of org/lm"
    for call in (sae, sae.encode, sae.pre_activations):
        with pytest.raises(ValueError, match=expected):
            call(torch.zeros(5, 13))


def test_wrong_prefixes_and_latents_are_refused() -> None:
    sae, x = make_sae(), make_x()
    for prefix in (0, 41):
        for call in (lambda m: sae.encode(x, prefix=m), lambda m: sae.decode(sae.encode(x), prefix=m), sae.truncate):
            with pytest.raises(ValueError, match=f"prefix must be from 1 to num_latents=40, got {prefix}"):
                call(prefix)
    with pytest.raises(ValueError, match="at most num_latents=40 columns, got 41"):
        sae.decode(torch.zeros(3, 41))
    with pytest.raises(ValueError, match=r"needs all latents, \(\.\.\., 40\), got \(4, 20\)"):
        sae.decode_levels(torch.zeros(4, 20))


# Prefixes


@pytest.mark.parametrize("activation", ACTIVATIONS)
@given(prefix=st.integers(1, 40), tokens=st.integers(1, 30), seed=st.integers(0, 100))
@settings(max_examples=15, deadline=None, derandomize=True)
def test_a_prefix_is_the_truncated_model(activation: str, prefix: int, tokens: int, seed: int) -> None:
    sae, x = make_sae(activation, seed=seed).eval(), make_x(tokens, WIDTH, seed=seed)
    cut = sae.truncate(prefix)
    assert cut.config.num_latents == prefix
    assert not cut.training
    latents = sae.encode(x, prefix=prefix)
    assert torch.equal(cut.encode(x), latents)
    assert torch.equal(cut.decode(latents), sae.decode(latents, prefix=prefix))
    whole = sae.encode(x)
    torch.testing.assert_close(latents, whole[:, :prefix], rtol=1e-5, atol=1e-6)
    assert torch.equal(sae.decode(whole, prefix=prefix), sae.decode(whole[:, :prefix]))
    masked = whole.clone()
    masked[:, prefix:] = 0
    torch.testing.assert_close(sae.decode(whole, prefix=prefix), sae.decode(masked), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prefix_from_disk_is_the_truncated_model(activation: str, dtype: torch.dtype, tmp_path: Path) -> None:
    make_sae(activation).save_pretrained(tmp_path)
    whole = MatryoshkaSAE.from_pretrained(tmp_path, dtype=dtype)
    x = make_x(7, 9, WIDTH).to(dtype)
    for prefix in (1, 8, 13, 16, 40):
        cut, loaded = whole.truncate(prefix), MatryoshkaSAE.from_pretrained(tmp_path, prefix=prefix, dtype=dtype)
        assert loaded.config.to_dict() == {**cut.config.to_dict(), "_name_or_path": str(tmp_path)}
        assert not loaded.training
        for name, tensor in cut.state_dict().items():
            other = loaded.state_dict()[name]
            assert other.dtype == tensor.dtype
            assert torch.equal(other, tensor), name
        latents = whole.encode(x, prefix=prefix)
        assert torch.equal(loaded.encode(x), latents)
        assert torch.equal(loaded.decode(latents), whole.decode(latents, prefix=prefix))


def test_a_prefix_from_disk_uses_no_later_rows(tmp_path: Path) -> None:
    sae = make_sae()
    sae.save_pretrained(tmp_path)
    whole = MatryoshkaSAE.from_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    for name, tensor in state.items():
        if name != "b_dec":
            tensor[16:] = torch.nan
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, x = MatryoshkaSAE.from_pretrained(tmp_path, prefix=16), make_x()
    assert torch.equal(loaded.encode(x), whole.encode(x, prefix=16))
    assert sum(p.numel() for p in loaded.parameters()) == 2 * 16 * WIDTH + 16 + WIDTH


def test_a_wide_prefix_from_disk_is_exact_at_the_size_of_a_real_layer(tmp_path: Path) -> None:
    """Long rows take other kernels than the tiny models above."""
    torch.manual_seed(0)
    sae = MatryoshkaSAE(MatryoshkaSAEConfig(hidden_size=321, num_latents=1500, prefix_sizes=[100, 777, 1500], k=20))
    sae.save_pretrained(tmp_path)
    sae, x = sae.eval(), random(130, 321, seed=3)
    whole = MatryoshkaSAE.from_pretrained(tmp_path)
    assert torch.equal(whole.encode(x), sae.encode(x))
    for prefix in (100, 777, 1001):
        loaded = MatryoshkaSAE.from_pretrained(tmp_path, prefix=prefix)
        latents = sae.encode(x, prefix=prefix)
        assert torch.equal(loaded.encode(x), latents)
        assert torch.equal(sae.truncate(prefix).encode(x), latents)
        assert torch.equal(loaded.decode(latents), sae.decode(latents, prefix=prefix))
        torch.testing.assert_close(latents, sae.encode(x)[:, :prefix], rtol=1e-5, atol=1e-6)


def test_truncation_copies() -> None:
    sae = make_sae()
    cut = sae.truncate(8)
    with torch.no_grad():
        cut.W_dec.zero_()
        cut.threshold.zero_()
    assert sae.W_dec[:8].abs().min() > 0
    assert sae.threshold.min() > 0
    assert cut.training
    assert all(parameter.requires_grad for parameter in cut.parameters())
    assert cut(make_x()).loss.requires_grad


# Files


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_save_and_load_give_every_tensor_back(activation: str, tmp_path: Path) -> None:
    sae, x = make_sae(activation, base_model="org/lm", level_weights=[1, 2, 3]), make_x()
    sae.save_pretrained(tmp_path)
    loaded = MatryoshkaSAE.from_pretrained(tmp_path)
    state, expected = loaded.state_dict(), sae.state_dict()
    assert set(state) == {"W_enc", "b_enc", "W_dec", "b_dec", "threshold", "max_activation", "firing_rate"}
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name
        assert state[name].dtype == torch.float32
    assert loaded.config.to_diff_dict() == sae.config.to_diff_dict()
    assert not loaded.training
    assert torch.equal(loaded.encode(x), sae.eval().encode(x))
    assert torch.equal(loaded.train()(x).loss, sae.train()(x).loss)
    assert {name for name, _ in loaded.named_parameters()} == {name for name, _ in sae.named_parameters()}


@pytest.mark.parametrize("activation", ["batch_topk", "jumprelu"])
def test_loading_in_bfloat16_keeps_what_is_measured_in_float32(activation: str, tmp_path: Path) -> None:
    sae = make_sae(activation)
    sae.save_pretrained(tmp_path)
    loaded = MatryoshkaSAE.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, tensor in loaded.state_dict().items():
        expected = sae.state_dict()[name]
        if name in ("threshold", "max_activation", "firing_rate"):
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, expected), name
        else:
            assert torch.equal(tensor, expected.bfloat16()), name
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    stored = load_file(again / "model.safetensors")
    assert stored["threshold"].dtype == torch.float32
    assert stored["W_dec"].dtype == torch.bfloat16
    assert MatryoshkaSAE.from_pretrained(again).W_enc.dtype == torch.bfloat16
    assert loaded.encode(make_x()).dtype == torch.bfloat16


def edit_weights(folder: Path, add: dict[str, Tensor], remove: tuple[str, ...] = ()) -> None:
    state = load_file(folder / "model.safetensors") | add
    kept = {name: tensor for name, tensor in state.items() if name not in remove}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("arguments", [{}, {"prefix": 8}])
def test_missing_and_unexpected_weights_raise(arguments: dict, tmp_path: Path) -> None:
    make_sae().save_pretrained(tmp_path / "missing")
    edit_weights(tmp_path / "missing", {}, remove=("threshold", "b_enc"))
    with pytest.raises(ValueError, match=r"missing_keys: \['b_enc', 'threshold'\].*config.json and model.safetensors"):
        MatryoshkaSAE.from_pretrained(tmp_path / "missing", **arguments)
    make_sae().save_pretrained(tmp_path / "more")
    edit_weights(tmp_path / "more", {"W_extra": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"unexpected_keys: \['W_extra'\]"):
        MatryoshkaSAE.from_pretrained(tmp_path / "more", **arguments)


@pytest.mark.parametrize("arguments", [{}, {"prefix": 8}])
def test_weights_of_another_shape_raise(arguments: dict, tmp_path: Path) -> None:
    make_sae().save_pretrained(tmp_path)
    edit_weights(tmp_path, {"W_dec": torch.zeros(40, WIDTH + 1)})
    with pytest.raises(ValueError, match=r"mismatched_keys: \[\('W_dec', .*13.*12"):
        MatryoshkaSAE.from_pretrained(tmp_path, **arguments)


def test_loading_info_is_given_when_asked_for(tmp_path: Path) -> None:
    make_sae().save_pretrained(tmp_path)
    for arguments in ({}, {"prefix": 8}):
        model, info = MatryoshkaSAE.from_pretrained(tmp_path, output_loading_info=True, **arguments)
        assert isinstance(model, MatryoshkaSAE)
        assert not info["missing_keys"]


@pytest.mark.parametrize("arguments", [{}, {"prefix": 9}])
def test_loaded_weights_are_aligned_copies(arguments: dict, tmp_path: Path) -> None:
    """A product's last bit depends on where in memory a tensor begins, which in a file is anywhere."""
    sae = make_sae(hidden_size=13)
    sae.save_pretrained(tmp_path)
    loaded = MatryoshkaSAE.from_pretrained(tmp_path, **arguments)
    for name, tensor in loaded.state_dict().items():
        assert tensor.data_ptr() % 64 == 0, name
    expected = copy.deepcopy(loaded.state_dict())
    path = tmp_path / "model.safetensors"
    with path.open("r+b") as file:
        file.seek(2000)
        file.write(bytes(path.stat().st_size - 2000))
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_auto_classes_need_no_remote_code(tmp_path: Path) -> None:
    sae = make_sae()
    sae.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is MatryoshkaSAEConfig
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is MatryoshkaSAE
    assert torch.equal(loaded.W_dec, sae.W_dec)
    cut = AutoModel.from_pretrained(tmp_path, prefix=8)
    assert torch.equal(cut.W_dec, sae.W_dec[:8])
    assert type(AutoModel.from_config(sae.config)) is MatryoshkaSAE


def test_copies_and_pickles_equal_the_original() -> None:
    sae, x = make_sae("jumprelu").eval(), make_x()
    expected = sae.encode(x)
    buffer = io.BytesIO()
    pickle.dump(sae, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(sae), pickle.load(buffer)):
        assert torch.equal(other.encode(x), expected)
        assert other.config.to_dict() == sae.config.to_dict()
        with torch.no_grad():
            other.W_enc.zero_()
    assert torch.equal(sae.encode(x), expected)
    assert copy.deepcopy(sae.config).prefix_sizes == SIZES


# Precision


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_training_under_bfloat16_autocast_is_near_float32(activation: str) -> None:
    sae, x = make_sae(activation), make_x(256, WIDTH)
    dead = torch.arange(40) % 5 == 0
    exact = sae(x, dead_latents=dead)
    with torch.autocast("cpu", torch.bfloat16):
        output = sae(x, dead_latents=dead)
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    assert output.loss.item() == pytest.approx(exact.loss.item(), rel=0.03)
    for name, parameter in sae.named_parameters():
        assert gradient(parameter).dtype == torch.float32, name
        assert gradient(parameter).isfinite().all(), name
        assert gradient(parameter).abs().max() > 0, name


def test_a_bfloat16_model_compares_with_its_float32_threshold() -> None:
    sae, x = make_sae().bfloat16().eval(), make_x(9, WIDTH)
    pre = sae.pre_activations(x)
    # Just below the first token's values, by less than a step of bfloat16.
    sae.threshold.data = pre[0].float().relu() * (1 - 2**-12)
    assert torch.equal(sae.encode(x)[0], pre[0].relu())
    assert torch.equal(sae(x).latents[0], pre[0].relu())
    assert int((pre[0] > 0).sum()) > 3


def test_activations_of_another_precision_are_read() -> None:
    sae, x = make_sae().eval(), make_x().bfloat16()
    assert torch.equal(sae.encode(x), sae.encode(x.float()))
    assert sae(x).reconstruction.dtype == torch.float32
