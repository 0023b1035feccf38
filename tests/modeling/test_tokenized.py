"""A tokenized SAE adds a learnt vector of the activation's own token to every level of what it reconstructs."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig

WIDTH, LATENTS, SIZES, TOKENS = 10, 32, [4, 12, 32], 7
ACTIVATIONS = ["batch_topk", "topk", "jumprelu", "relu"]
properties = settings(max_examples=20, deadline=None, derandomize=True)


def make(activation: str = "batch_topk", seed: int = 0, **change) -> MatryoshkaSAE:
    torch.manual_seed(seed)
    shape = {"hidden_size": WIDTH, "num_latents": LATENTS, "prefix_sizes": SIZES, "k": 3, "lookup_size": TOKENS}
    sae = MatryoshkaSAE(MatryoshkaSAEConfig(**{**shape, "activation": activation, **change})).double()
    with torch.no_grad():
        sae.b_dec.normal_()
        sae.b_enc.normal_(0, 0.1)
        if sae.W_token is not None:
            sae.W_token.normal_()
        if activation != "relu":
            sae.threshold.uniform_(0.3, 1.2)
    return sae


def draw(tokens: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, WIDTH, generator=generator, dtype=torch.float64)
    return x, torch.randint(TOKENS, (tokens,), generator=generator)


def plain(sae: MatryoshkaSAE) -> MatryoshkaSAE:
    """The same SAE without its table."""
    config = MatryoshkaSAEConfig(**sae.config.to_dict() | {"lookup_size": None})
    other = MatryoshkaSAE(config).double().train(sae.training)
    other.load_state_dict({name: tensor for name, tensor in sae.state_dict().items() if name != "W_token"})
    return other


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@given(tokens=st.integers(2, 40), seed=st.integers(0, 1000))
@properties
def test_its_levels_miss_what_those_of_the_plain_one_miss_less_the_vectors(
    activation: str, sparse: bool, tokens: int, seed: int
) -> None:
    """Which latents are active, and how strongly, does not depend on the token; the errors do, and their gradients."""
    sae, (x, ids) = make(activation, seed, sparsity_weight=0.0).train(), draw(tokens, seed)
    f = plain(sae)(x).latents.detach()
    levels = [sae.b_dec + sae.W_token[ids] + f[:, :m] @ sae.W_dec[:m] for m in SIZES]
    variance = x.var(0, unbiased=False).sum()
    losses = torch.stack([(x - level).pow(2).sum(-1).mean() / variance for level in levels])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_msae.modeling.sparse_encoder.CPU_DENSE_SHARE", 1e9 if sparse else 0.0)
        output = sae(x, token_ids=ids)
    torch.testing.assert_close(output.latents, f, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(output.level_losses, losses.detach(), rtol=1e-9, atol=1e-9)
    got = torch.autograd.grad(output.loss, [sae.W_token, sae.W_dec])
    for mine, theirs in zip(got, torch.autograd.grad(losses.mean(), [sae.W_token, sae.W_dec]), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


def test_latents_do_not_depend_on_the_table() -> None:
    sae, (x, _) = make().eval(), draw(30)
    assert torch.equal(sae.encode(x), plain(sae).encode(x))
    assert sae.calibrate_threshold([x]) == plain(sae).calibrate_threshold([x])


def test_the_auxiliary_loss_learns_what_the_vectors_leave_over() -> None:
    sae, (x, ids) = make(num_aux_latents=2).train(), draw(40)
    dead = torch.arange(LATENTS) >= 20
    output = sae(x, token_ids=ids, dead_latents=dead)
    pre = ((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc).masked_fill(~dead, -torch.inf)
    f = pre.clamp(min=0) * (pre >= pre.sort(dim=1, descending=True).values[:, 1:2])
    error = (x - output.reconstruction - f @ sae.W_dec).pow(2).sum(1).mean()
    assert output.aux_loss.item() == pytest.approx((error / x.var(0, unbiased=False).sum()).item(), rel=1e-9)


def test_batches_of_any_shape_and_in_parts_are_reconstructed_alike(monkeypatch) -> None:
    sae, (x, ids) = make().eval(), draw(24)
    whole = sae.reconstruct_levels(x, ids)
    assert torch.equal(whole, sae.decode_levels(sae.encode(x), token_ids=ids))
    shaped = sae.reconstruct_levels(x.view(2, 3, 4, WIDTH), ids.view(2, 3, 4))
    torch.testing.assert_close(shaped, whole.view(3, 2, 3, 4, WIDTH), rtol=1e-12, atol=1e-12)
    monkeypatch.setattr("hf_msae.modeling.modeling_matryoshka_sae.tokens_at_once", lambda size, device: 5)
    torch.testing.assert_close(sae.reconstruct_levels(x, ids), whole, rtol=1e-12, atol=1e-12)
    expected = sae.encode(x)[:, :12] @ sae.W_dec[:12] + sae.b_dec + sae.W_token[ids]
    torch.testing.assert_close(sae.decode(sae.encode(x), 12, token_ids=ids), expected, rtol=1e-12, atol=1e-12)


def test_others_do_not_look_at_token_ids() -> None:
    sae, (x, ids) = plain(make()), draw(12)
    assert torch.equal(sae(x, token_ids=ids).loss, sae(x).loss)


@pytest.mark.parametrize("call", ["forward", "decode", "decode_levels", "reconstruct_levels"])
def test_token_ids_that_are_missing_or_do_not_fit_are_refused(call: str) -> None:
    sae, (x, ids) = make(lookup_tokenizer="owls/tokens").eval(), draw(12)
    given = x if call in ("forward", "reconstruct_levels") else sae.encode(x)
    reconstruct = getattr(sae, call)
    with pytest.raises(ValueError, match=r"adds a vector of the activation's own token .*lookup_size=7.*token_ids"):
        reconstruct(given)
    with pytest.raises(ValueError, match=r"one for each of the 12 activations, got \(11,\) of int64"):
        reconstruct(given, token_ids=ids[1:])
    with pytest.raises(ValueError, match=r"whole numbers.* got \(12,\) of float32"):
        reconstruct(given, token_ids=ids.float())
    for wrong in (TOKENS, -1):
        with pytest.raises(ValueError, match=r"this SAE knows ids below 7, those of owls/tokens"):
            reconstruct(given, token_ids=torch.cat([ids[1:], torch.tensor([wrong])]))


def test_a_table_without_rows_is_refused() -> None:
    with pytest.raises(StrictDataclassError, match="lookup_size must be at least 1, got 0"):
        MatryoshkaSAEConfig(hidden_size=8, num_latents=16, k=2, lookup_size=0)
    assert MatryoshkaSAEConfig(hidden_size=8, num_latents=64, lookup_size=5).weight_shapes["W_token"] == (5, 8)
