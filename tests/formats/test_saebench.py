"""What SAEBench asks of an SAE, asked; and, where it is installed, by SAEBench itself."""

import dataclasses
import json

import pytest
import torch

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.formats.saebench import SAEBenchSAE, to_saebench

D, F = 12, 40
PLACE = {"base_model": "google/gemma-2-2b", "site": "model.layers.12:output"}


def make_sae(dtype: torch.dtype = torch.float32, **values) -> MatryoshkaSAE:
    config = {"hidden_size": D, "num_latents": F, "k": 6, "prefix_sizes": [8, 20, F], "context_length": 64}
    sae = MatryoshkaSAE(MatryoshkaSAEConfig(**(config | PLACE | values)))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (sae.W_enc, sae.b_enc, sae.b_dec):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) / 3)
        sae.threshold.copy_(torch.rand(F, generator=generator))
        for tensor in (sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec):
            tensor.data = tensor.data.to(dtype)
    return sae.eval()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, 5, D, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", [{}, {"activation": "topk", "inference": "topk"}, {"activation": "jumprelu"}])
@pytest.mark.parametrize("prefix", [None, 20, 13])
def test_computes_what_the_model_computes(x: torch.Tensor, kind: dict, prefix: int | None) -> None:
    sae = make_sae(**kind)
    bench = to_saebench(sae, prefix)
    latents = sae.encode(x, prefix=prefix)
    assert (latents > 0).any()
    for shape in ((3, 5), (15,)):
        given = x.reshape(*shape, D)
        assert torch.equal(bench.encode(given), latents.reshape(*shape, -1))
        assert torch.equal(bench.decode(bench.encode(given)), sae.decode(latents).reshape(*shape, D))
        assert torch.equal(bench(given), bench.decode(bench.encode(given)))


@pytest.mark.parametrize("prefix", [None, 20])
def test_matrices_have_saelens_orientation_and_explain_the_numbers(x: torch.Tensor, prefix: int | None) -> None:
    sae = make_sae()
    bench, size = to_saebench(sae, prefix), prefix or F
    assert (bench.W_enc.data.shape, bench.W_dec.data.shape) == ((D, size), (size, D))
    pre = (x - bench.b_dec) @ bench.W_enc + bench.b_enc
    latents = pre.relu() * (pre > sae.threshold[:size])
    torch.testing.assert_close(bench.encode(x), latents, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(bench(x), latents @ bench.W_dec + bench.b_dec, rtol=1e-5, atol=1e-5)


def test_moves_without_rounding_thresholds_or_moving_the_model(x: torch.Tensor) -> None:
    sae = make_sae()
    bench = to_saebench(sae)
    assert bench.to(device=torch.device("cpu"), dtype=torch.bfloat16) is bench
    assert (bench.dtype, bench.device) == (torch.bfloat16, torch.device("cpu"))
    assert (bench.cfg.dtype, bench.cfg.device) == ("bfloat16", "cpu")
    assert bench.encode(x).dtype == bench(x).dtype == torch.bfloat16
    assert torch.equal(bench.sae.threshold, sae.threshold)
    assert sae.dtype == torch.float32
    # float32 latents, as some evaluations pass them, decode too.
    assert bench.decode(bench.encode(x).float()).shape == x.shape


def test_what_it_writes_into_the_matrices_stays_with_it() -> None:
    sae = make_sae()
    before = sae.W_dec.clone()
    to_saebench(sae).W_dec.data.zero_()
    assert torch.equal(sae.W_dec, before)


def test_configuration_is_a_dataclass_that_may_be_written_to() -> None:
    cfg = to_saebench(make_sae(), 20).cfg
    assert (cfg.model_name, cfg.hook_name, cfg.hook_layer) == ("gemma-2-2b", "blocks.12.hook_resid_post", 12)
    assert (cfg.d_in, cfg.d_sae, cfg.dtype, cfg.context_size) == (D, 20, "float32", 64)
    assert (cfg.architecture, cfg.prepend_bos) == ("matryoshka_batch_topk", True)
    cfg.metadata = object()  # type: ignore[attr-defined]
    cfg.dtype = "bfloat16"
    assert json.loads(json.dumps(cfg.to_dict()))["dtype"] == "bfloat16"
    assert cfg.to_dict() == dataclasses.asdict(cfg)


def test_a_single_level_is_not_called_matryoshka() -> None:
    assert to_saebench(make_sae(), 8).cfg.architecture == "batch_topk"


@pytest.mark.parametrize(
    "place",
    [
        {"base_model": None},
        {"site": None},
        {"base_model": "someone/model"},
        {"site": "model.layers.12.mlp:input"},
        {"site": "model.layers.12.self_attn.o_proj:input"},
    ],
)
def test_needs_a_place_that_transformerlens_hooks(place: dict) -> None:
    with pytest.raises(ValueError, match=r"Set sae\.config\.base_model"):
        to_saebench(make_sae(**place))


def test_refuses_a_prefix_out_of_range() -> None:
    with pytest.raises(ValueError, match="prefix must be from 1 to num_latents=40, got 41"):
        to_saebench(make_sae(), 41)


def test_the_model_offers_it(x: torch.Tensor) -> None:
    bench = make_sae().to_saebench(prefix=8)
    assert isinstance(bench, SAEBenchSAE)
    assert bench.encode(x).shape == (3, 5, 8)


@pytest.mark.peer
def test_saebench_takes_it() -> None:
    reason = "needs SAEBench (pip install --no-deps sae-bench, beside SAELens)"
    utils = pytest.importorskip("sae_bench.sae_bench_utils.general_utils", reason=reason)
    bench = to_saebench(make_sae())
    sae_id, taken, sparsity = utils.load_and_format_sae("release", bench, "cpu")
    assert (sae_id, sparsity) == ("custom_sae", None)
    assert taken is bench
    assert utils.check_decoder_norms(taken.W_dec.data)
    assert bench.cfg.metadata.hook_name == "blocks.12.hook_resid_post"
    assert bench.cfg.architecture_str == "matryoshka_batch_topk"
    assert "metadata" not in json.loads(json.dumps(bench.cfg.to_dict()))


@pytest.mark.peer
def test_saebench_measures_what_the_model_computes() -> None:
    """SAEBench's core evaluation on a random language model of TransformerLens, beside the same numbers from here."""
    reason = "needs SAEBench (pip install --no-deps sae-bench tabulate, beside SAELens)"
    pytest.importorskip("sae_bench", reason=reason)
    from datasets import Dataset
    from sae_bench.evals.core import main as core
    from sae_bench.sae_bench_utils.general_utils import load_and_format_sae
    from sae_lens import ActivationsStore
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    torch.manual_seed(0)
    shape = {"n_layers": 2, "d_model": D, "n_ctx": 16, "d_head": 6, "d_vocab": 50, "act_fn": "gelu"}
    model = HookedTransformer(HookedTransformerConfig(**shape))
    sae = make_sae(site="layers.1", base_model="gpt2", context_length=16, prepend_bos=False)
    with torch.no_grad():
        sae.W_enc.mul_(20)  # activations of an untrained model are small
    bench = to_saebench(sae, 20)
    load_and_format_sae("release", bench, "cpu")
    tokens = torch.randint(50, (8, 16))  # one batch: each that SAEBench draws is all of them
    dataset = Dataset.from_dict({"tokens": tokens.tolist()})
    store = ActivationsStore.from_sae(model, bench, dataset=dataset, streaming=False, store_batch_size_prompts=8)
    config = core.CoreEvalConfig(
        model_name="gpt2",
        batch_size_prompts=8,
        n_eval_reconstruction_batches=1,
        n_eval_sparsity_variance_batches=1,
        compute_kl=True,
        compute_ce_loss=True,
        compute_l2_norms=True,
        compute_sparsity_metrics=True,
        compute_variance_metrics=True,
        compute_featurewise_density_statistics=True,
        compute_featurewise_weight_based_metrics=True,
    )
    measured, _ = core.run_evals(bench, store, model, config)
    _, cache = model.run_with_cache(tokens)
    latents = sae.encode(cache["blocks.1.hook_resid_post"], prefix=20)
    expected = {
        "l0": (latents > 0).sum(-1).float().mean().item(),
        "l1": latents.sum(-1).mean().item(),
        "l2_norm_out": sae.decode(latents).norm(dim=-1).mean().item(),
    }
    assert 1 < expected["l0"] < 19
    found = measured["sparsity"] | measured["shrinkage"]
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    # What random weights reconstruct must show in the language model's loss.
    performance = measured["model_performance_preservation"]
    assert abs(performance["ce_loss_with_sae"] - performance["ce_loss_without_sae"]) > 1e-3
