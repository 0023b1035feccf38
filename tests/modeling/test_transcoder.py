"""A transcoder reads one activation and reconstructs another: its loss by definition, its prefixes, its files.

By choice it is tokenized, too, and adds a vector of each activation's token (`test_tokenized.py` has SAEs that do).
"""

from pathlib import Path

import pytest
import torch
from hf_msae.modeling.dense_ops import JumpReLU
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig

ACTIVATIONS = ["batch_topk", "topk", "jumprelu", "relu"]
READ, WRITTEN, LATENTS, SIZES, TOKENS = 12, 7, 40, [5, 16, 40], 9
# How gradients of inner levels may be passed on.
PASSED = [
    {},
    {"detach_prefixes": True},
    {"inner_decoder_share": 0.3, "inner_activation_share": 0.5},
    {"inner_decoder_share": 0.0},
    {"inner_activation_share": 0.25},
]
properties = settings(max_examples=20, deadline=None, derandomize=True)


def make(activation: str = "batch_topk", skip: bool = True, seed: int = 0, **change) -> MatryoshkaSAE:
    """A transcoder in float64 whose tensors all differ from what initialisation gives."""
    torch.manual_seed(seed)
    shape = {"hidden_size": READ, "hidden_size_out": WRITTEN, "num_latents": LATENTS, "prefix_sizes": SIZES}
    sae = MatryoshkaSAE(MatryoshkaSAEConfig(**{**shape, "k": 3, "activation": activation, "skip": skip, **change}))
    sae = sae.double()
    with torch.no_grad():
        sae.b_enc.normal_(0, 0.1)
        sae.b_dec.normal_()
        if skip:
            sae.W_skip.normal_()
        if sae.W_token is not None:
            sae.W_token.normal_()
        if activation != "relu":
            sae.threshold.uniform_(0.3, 1.2)
        sae.max_activation.uniform_(1, 3)
    return sae.train()


def draw(tokens: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, READ, generator=generator, dtype=torch.float64)
    return x, torch.randn(tokens, WRITTEN, generator=generator, dtype=torch.float64) * 3 + 1


def draw_ids(tokens: int, seed: int = 1) -> Tensor:
    return torch.randint(TOKENS, (tokens,), generator=torch.Generator().manual_seed(seed))


def latents_by_definition(sae: MatryoshkaSAE, x: Tensor, variance: Tensor) -> Tensor:
    """Of a step of training, (B, F)."""
    pre = torch.einsum("fd,bd->bf", sae.W_enc, x) + sae.b_enc
    k = sae.config.k
    if sae.config.activation == "relu":
        return pre.clamp(min=0)
    if sae.config.activation == "jumprelu":
        bandwidth = sae.config.jumprelu_bandwidth * (variance / WRITTEN).sqrt()
        return JumpReLU.apply(pre, sae.threshold, bandwidth)[0]
    if sae.config.activation == "topk":
        limit = pre.sort(dim=-1, descending=True).values[:, k - 1 : k]
    else:
        limit = pre.flatten().sort(descending=True).values[round(k * len(x)) - 1]
    return pre.clamp(min=0) * (pre >= limit)


def share_of(tensor: Tensor, share: float) -> Tensor:
    """The tensor, of whose gradient a share is passed on."""
    return share * tensor + (1 - share) * tensor.detach()


def levels_by_definition(sae: MatryoshkaSAE, x: Tensor, f: Tensor, ids: Tensor | None = None) -> list[Tensor]:
    """The reconstruction of every level, (B, output_size)."""
    config, levels, before = sae.config, [], 0
    for m in config.prefix_sizes:
        whole = m == config.num_latents
        decoder, activations = (1.0, 1.0) if whole else (config.inner_decoder_share, config.inner_activation_share)
        base = sae.b_dec if sae.W_skip is None else sae.b_dec + torch.einsum("od,bd->bo", sae.W_skip, x)
        base = base if sae.W_token is None else base + sae.W_token[ids]
        inner = share_of(f[:, :m], activations) @ share_of(sae.W_dec[:m], decoder)
        level = share_of(base, decoder) + inner
        if config.detach_prefixes and before:
            own = f[:, before:m] @ sae.W_dec[before:m]
            level = own + (level - own).detach()
        levels.append(level)
        before = m
    return levels


@given(
    activation=st.sampled_from(ACTIVATIONS),
    skip=st.booleans(),
    passed=st.sampled_from(PASSED),
    tokens=st.integers(2, 30),
    sparse=st.booleans(),
    lookup_size=st.sampled_from([None, TOKENS]),
    seed=st.integers(0, 1000),
)
@properties
def test_loss_and_gradients_are_those_of_the_definition(
    activation: str, skip: bool, passed: dict, tokens: int, sparse: bool, lookup_size: int | None, seed: int
) -> None:
    """On the sparse path, and, where latents may be too many for it, on the dense one."""
    sae = make(activation, skip, seed, sparsity_weight=0.0, lookup_size=lookup_size, **passed)
    (x, y), ids = draw(tokens, seed), draw_ids(tokens, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_msae.modeling.sparse_encoder.CPU_DENSE_SHARE", 1e9 if sparse else 0.0)
        output = sae(x, target=y, token_ids=ids)
    variance = y.var(dim=0, unbiased=False).sum()
    levels = levels_by_definition(sae, x, latents_by_definition(sae, x, variance), ids)
    losses = torch.stack([(y - level).pow(2).sum(-1).mean() / variance for level in levels])
    torch.testing.assert_close(output.level_losses, losses.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(output.reconstruction.detach(), levels[-1].detach(), rtol=1e-9, atol=1e-9)
    wanted = dict(sae.named_parameters())
    got = torch.autograd.grad(output.loss, list(wanted.values()))
    expected = torch.autograd.grad(losses.mean(), list(wanted.values()))
    for name, mine, theirs in zip(wanted, got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("skip", [False, True])
def test_dead_latents_learn_what_is_left_of_the_target(skip: bool) -> None:
    sae, (x, y) = make(skip=skip, num_aux_latents=3, aux_loss_weight=0.25), draw(30)
    dead = torch.zeros(LATENTS, dtype=torch.bool)
    dead[[2, 9, 20, 21, 33]] = True
    output = sae(x, target=y, dead_latents=dead)
    pre = (torch.einsum("fd,bd->bf", sae.W_enc, x) + sae.b_enc).masked_fill(~dead, -torch.inf)
    f = pre.clamp(min=0) * (pre >= pre.sort(dim=1, descending=True).values[:, 2:3])
    error = (y - output.reconstruction - f @ sae.W_dec).pow(2).sum(1).mean()
    assert output.aux_loss.item() == pytest.approx((error / y.var(0, unbiased=False).sum()).item(), rel=1e-9)
    half = make(skip=skip)(x, target=y, dead_latents=dead).aux_loss.item()
    assert half == make(skip=skip, num_aux_latents=WRITTEN // 2)(x, target=y, dead_latents=dead).aux_loss.item()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@given(
    prefix=st.integers(1, LATENTS),
    tokens=st.integers(1, 30),
    seed=st.integers(0, 100),
    skip=st.booleans(),
    lookup_size=st.sampled_from([None, TOKENS]),
)
@settings(max_examples=15, deadline=None, derandomize=True)
def test_a_prefix_is_the_truncated_transcoder(
    activation: str, prefix: int, tokens: int, seed: int, skip: bool, lookup_size: int | None
) -> None:
    sae = make(activation, skip, seed, lookup_size=lookup_size).eval()
    (x, _), ids = draw(tokens, seed), draw_ids(tokens, seed)
    cut = sae.truncate(prefix)
    assert (cut.config.num_latents, cut.config.output_size, cut.config.skip) == (prefix, WRITTEN, skip)
    latents = sae.encode(x, prefix=prefix)
    assert torch.equal(cut.encode(x), latents)
    assert torch.equal(cut.decode(latents, None, x, ids), sae.decode(latents, prefix, x, ids))
    levels = sae.decode_levels(sae.encode(x), x, ids)
    assert torch.equal(sae.reconstruct_levels(x, ids), levels)
    expected = sae.decode(sae.encode(x), 16, x, ids)
    torch.testing.assert_close(levels[1], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("lookup_size", [None, TOKENS])
@pytest.mark.parametrize("skip", [False, True])
def test_files_hold_it_and_their_first_rows_are_a_prefix(skip: bool, lookup_size: int | None, tmp_path: Path) -> None:
    places = {"site": "model.layers.3.mlp:input", "site_out": "model.layers.3.mlp:output", "norm_limit_out": 4.5}
    sae, (x, _), ids = make(skip=skip, lookup_size=lookup_size, **places).eval(), draw(9), draw_ids(9)
    sae.save_pretrained(tmp_path)
    back = MatryoshkaSAE.from_pretrained(tmp_path)
    assert back.config.to_dict() == {**sae.config.to_dict(), "_name_or_path": str(tmp_path), "dtype": "float64"}
    assert torch.equal(back.reconstruct_levels(x, ids), sae.reconstruct_levels(x, ids))
    for prefix in (3, 16, 40):
        part = MatryoshkaSAE.from_pretrained(tmp_path, prefix=prefix)
        assert sum(p.numel() for p in part.parameters()) == (
            prefix * (READ + WRITTEN + 1) + WRITTEN + skip * WRITTEN * READ + (lookup_size or 0) * WRITTEN
        )
        assert torch.equal(part.reconstruct_levels(x, ids)[-1], sae.truncate(prefix).reconstruct_levels(x, ids)[-1])


def test_any_leading_dimensions_are_kept() -> None:
    sae, (x, y) = make(), draw(24)
    output = sae(x.view(2, 3, 4, READ), target=y.view(2, 3, 4, WRITTEN))
    assert output.reconstruction.shape == (2, 3, 4, WRITTEN)
    assert output.latents.shape == (2, 3, 4, LATENTS)
    assert torch.equal(output.loss, sae(x, target=y).loss)
    assert sae.eval().reconstruct_levels(x.view(2, 12, READ)).shape == (3, 2, 12, WRITTEN)


def test_a_wide_output_alone_makes_a_transcoder_and_the_site_alone_one_of_equal_widths() -> None:
    assert MatryoshkaSAEConfig(hidden_size=8, num_latents=64, hidden_size_out=4).weight_shapes["W_dec"] == (64, 4)
    same = MatryoshkaSAEConfig(hidden_size=8, num_latents=64, site="a:input", site_out="a:output")
    assert same.is_transcoder
    assert not same.apply_b_dec_to_input
    assert (same.output_size, same.output_site) == (8, "a:output")
    plain = MatryoshkaSAEConfig(hidden_size=8, num_latents=64, site="a")
    assert (plain.is_transcoder, plain.output_size, plain.output_site) == (False, 8, "a")
    assert "W_skip" not in plain.weight_shapes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"skip": True}, "skip=True is of a transcoder: give site_out and hidden_size_out"),
        ({"norm_limit_out": 3.0}, r"norm_limit_out=3\.0 is of a transcoder"),
        ({"site": "a:output", "site_out": "a:output"}, "both a:output: what reconstructs its own input is an SAE"),
        ({"hidden_size_out": 0}, "hidden_size_out must be at least 1, got 0"),
        ({"hidden_size_out": 4, "norm_limit_out": -1.0}, "norm_limit_out must be finite and not negative"),
    ],
)
def test_what_only_a_transcoder_has_is_refused_elsewhere(change: dict, message: str) -> None:
    with pytest.raises(StrictDataclassError, match=message):
        MatryoshkaSAEConfig(hidden_size=8, num_latents=64, **change)


def test_targets_go_with_transcoders_only_and_must_fit() -> None:
    sae, (x, y) = make(site_out="model.layers.3.mlp:output", base_model="org/lm"), draw(6)
    with pytest.raises(ValueError, match="A transcoder reconstructs a target, and none was given"):
        sae(x)
    with pytest.raises(
        ValueError, match=r"\(\.\.\., 7\), one for each of the 6 activations, got \(5, 7\)\. .*mlp:output"
    ):
        sae(x, target=y[:5])
    with pytest.raises(ValueError, match=r"got \(6, 12\)"):
        sae(x, target=x)
    with pytest.raises(ValueError, match=r"has a skip, .* give that as hidden_states"):
        sae.decode(sae.encode(x))
    with pytest.raises(ValueError, match="so select needs it"):
        sae.select(x)
    plain = MatryoshkaSAE(MatryoshkaSAEConfig(hidden_size=READ, num_latents=LATENTS, k=3)).double()
    with pytest.raises(ValueError, match=r"An SAE reconstructs its input, and a target \(6, 12\) was given"):
        plain(x, target=x)


def test_a_skip_of_another_shape_is_refused(tmp_path: Path) -> None:
    sae = make()
    state = sae.state_dict() | {"W_skip": sae.W_skip.detach().T}
    sae.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"mismatched_keys: \[\('W_skip', \(12, 7\), \(7, 12\)\)\]"):
        MatryoshkaSAE.from_pretrained(tmp_path)
