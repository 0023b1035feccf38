"""A step on a pretended GPU: what it waits for, that it gives the same bits again, and that it is the CPU's step."""

import copy
import os

import pytest
import torch
from hf_msae.modeling import devices, objective, sparse_encoder
from pretended_cuda import DEVICE, PretendedCuda, interpreted_kernels, pretended_cuda
from small_runs import make_learner
from torch import Tensor

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.data import as_documents, make_activation_cache
from hf_msae.sites import resolve_site
from hf_msae.training import SAETrainingArguments
from hf_msae.training.end_to_end import EndToEnd
from hf_msae.training.learner import Learner, make_learners
from hf_msae.training.loaders import CacheLoader, TextLoader, TextSource
from hf_msae.training.run import Run
from hf_msae.training.schedules import Length

pytestmark = pytest.mark.slow  # all operations pass through Python

ACTIVATIONS = ("batch_topk", "topk", "jumprelu", "relu")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
PATHS = [*((activation, "sparse") for activation in ACTIVATIONS), ("jumprelu", "dense"), ("relu", "dense")]
FORMS = {
    "log_loss": {"log_loss": True},
    "pareto": {"prefix_sampling": "pareto"},
    "held back": {"inner_decoder_share": 0.0, "inner_activation_share": 0.25},
    "detached": {"detach_prefixes": True},
    "aligned": {"aligned": True},
    "tokenized": {"lookup_size": 12},
    "p annealed": {"activation": "relu", "p_end": 0.2, "p_anneal_start": 2},
}
# Of a step whose segments are all short.
SUMS = ("_segment_sums", "_dots", "_mark_above", "_write_above", "_count_largest", "_write_largest")
KERNELS = (*SUMS, "_level_errors", "_level_gradients", "_row_products", "_adam_rows")


@pytest.fixture(autouse=True)
def torch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Triton is not asked for, a step takes torch's operations."""
    monkeypatch.setattr(devices, "runs_kernels", lambda device: INTERPRETED)


@pytest.fixture
def gpu():
    with pretended_cuda() as device:
        yield device


def batches(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [3 + 5 * torch.randn(96, 16, generator=generator) for _ in range(count)]


def train(learner: Learner, steps: int, gpu: PretendedCuda | None = None) -> Learner:
    """What the last step did is what the device has recorded."""
    given = [x.to(learner.device) for x in batches(steps)]
    lookup = learner.sae.config.lookup_size
    ids = [None if lookup is None else (torch.arange(len(x)) ** 2 % lookup).to(learner.device) for x in given]
    learner.start(given[0], token_ids=ids[0])
    for step in range(steps):
        if gpu is not None:
            gpu.clear()
        learner.step(given[step], step, token_ids=ids[step])
    return learner


def assert_nearly_the_same(there: Learner, here: Learner, tolerance: float = 1e-3) -> None:
    """Adam's steps have a fixed size, so a rounding error shows where a gradient is nearly nothing."""
    for (name, mine), its in zip(there.sae.named_parameters(), here.sae.parameters(), strict=True):
        assert ((mine.cpu() - its).abs() > tolerance * its.abs().max()).float().mean() < 0.02, name


@pytest.mark.parametrize("num_dead", [0, 32, 64])
@pytest.mark.parametrize(("activation", "path"), PATHS)
def test_a_step_waits_twice(gpu, monkeypatch, activation: str, path: str, num_dead: int) -> None:
    """For the number of candidates, and for that of dead latents."""
    monkeypatch.setattr(sparse_encoder, "dense_share", lambda device: 1.0 if path == "sparse" else -1.0)
    learner = train(make_learner(DEVICE, activation=activation, dead_after_tokens=1000), 2)
    learner.read_log()
    learner.silent_tokens[:num_dead] = 2000
    (x,) = batches(1)
    x = x.to(DEVICE)
    gpu.clear()
    learner.step(x, 2)
    assert len(gpu.syncs) == 2, [str(event) for event in gpu.syncs]
    assert gpu.syncs[1].function == "forward"
    assert (learner.read_log()["aux_loss"] > 0) == (num_dead > 0)


@pytest.mark.parametrize("form", [*ACTIVATIONS, *FORMS])
def test_a_step_gives_the_same_bits_again(gpu, monkeypatch, form: str) -> None:
    """Nothing in it adds floats in an order that a GPU chooses; a float `index_add_` once did, for b_enc."""
    monkeypatch.setattr(sparse_encoder, "dense_share", lambda device: 1.0)
    monkeypatch.setattr(objective, "dense_dead_share", lambda device: 0.0)
    options = {"activation": form} if form in ACTIVATIONS else FORMS[form]
    train(make_learner(DEVICE, dead_after_tokens=50, sort_latents_at=6, **options), 5, gpu)
    assert gpu.nondeterministic == [], [str(event) for event in gpu.nondeterministic]
    assert sum(gpu.operations.values()) > 100


@pytest.mark.parametrize("form", [*ACTIVATIONS, *FORMS])
def test_it_is_the_step_of_the_cpu(gpu, monkeypatch, form: str) -> None:
    monkeypatch.setattr(sparse_encoder, "dense_share", lambda device: 1.0)
    options = {"activation": form} if form in ACTIVATIONS else FORMS[form]
    options["dead_after_tokens"] = 50
    there, here = (train(make_learner(device, **options), 4) for device in (DEVICE, torch.device("cpu")))
    assert_nearly_the_same(there, here)
    assert torch.equal(there.silent_tokens.cpu(), here.silent_tokens)
    assert there.variance.item() == here.variance.item()


@pytest.mark.parametrize("options", [{"bf16": True}, {"gradient_accumulation_steps": 2}], ids=str)
def test_no_step_mixes_devices(gpu, options: dict) -> None:
    learner = train(make_learner(DEVICE, dead_after_tokens=50, **options), 4)
    assert all(parameter.device == DEVICE for parameter in learner.sae.parameters())
    state = learner.state_dict()["optimizer"]["b_dec"].values()
    assert {tensor.device for tensor in (*learner.latent_state().values(), *state)} == {DEVICE}


def test_predictions_count_where_the_language_model_is(gpu, lm, tokenizer, texts) -> None:
    """End-to-end fine-tuning on the device is that of the CPU, and mixes no devices."""
    learners = {}
    for device in (torch.device("cpu"), DEVICE):
        args = {"per_device_train_batch_size": 96, "use_cpu": True, "kl_from": 0, "block_tokens": 300, "seed": 1}
        run = Run(SAETrainingArguments(**args))
        run.device = device
        model, site = copy.deepcopy(lm).to(device), resolve_site(lm, "layers.0")
        loader = TextLoader(run, TextSource(model, tokenizer, [site], 32, False), as_documents(texts))
        loader.device = device
        loader.norm_limits = {site: None}
        torch.manual_seed(0)
        sae = MatryoshkaSAE(MatryoshkaSAEConfig(hidden_size=16, num_latents=64, prefix_sizes=[8, 64], k=4))
        places = ({"sae": sae}, {"sae": site}, Length(20))
        (learner,) = make_learners(run, *places, end_to_end=EndToEnd(run, model, loader))
        for step in range(2):
            learner.take(next(loader), step)
        learners[device.type] = learner
    here, there = learners["cpu"], learners[DEVICE.type]
    assert there.read_log()["kl"] == pytest.approx(here.read_log()["kl"], rel=1e-3)
    for mine, its in zip(here.sae.parameters(), there.sae.parameters(), strict=True):
        # Adam's steps have a fixed size, so a rounding error shows where a gradient is nearly nothing.
        assert ((mine - its.cpu()).abs() > 1e-3 * mine.abs().max()).float().mean() < 0.02


def test_cached_activations_arrive_once_and_without_waiting(gpu, lm, tokenizer, texts, tmp_path) -> None:
    sizes = {"context_length": 32, "batch_size": 64, "eval_tokens": 200, "calibration_tokens": 100}
    cache = make_activation_cache(lm, tokenizer, ["layers.0"], texts, tmp_path / "cache", max_tokens=600, **sizes)
    run = Run(SAETrainingArguments(per_device_train_batch_size=96, use_cpu=True))
    run.device = DEVICE
    loader = CacheLoader(run, cache, cache.sites, skip_rows=0)
    gpu.clear()
    (x,) = next(loader).values()
    assert (x.device, tuple(x.shape)) == (DEVICE, (96, 16))
    assert gpu.syncs == [], [str(event) for event in gpu.syncs]
    assert gpu.operations["aten._to_copy"] == 2  # the rows, and some of them in float64 for what they are like


def test_of_a_cache_a_process_copies_its_own_rows(gpu, lm, tokenizer, texts, tmp_path, monkeypatch) -> None:
    """Three processes take, together, the batches that one takes alone."""
    sizes = {"context_length": 32, "batch_size": 64, "eval_tokens": 200, "calibration_tokens": 100}
    cache = make_activation_cache(lm, tokenizer, ["layers.0"], texts, tmp_path / "cache", max_tokens=600, **sizes)
    gathered: list[int] = []
    take = Tensor.__getitem__

    def noting(x: Tensor, places) -> Tensor:
        gathered.append(len(places) if isinstance(places, Tensor) else 0)
        return take(x, places)

    monkeypatch.setattr(Tensor, "__getitem__", noting)
    found = {}
    for rank, num_processes in [(0, 1), (0, 3), (1, 3), (2, 3)]:
        run = Run(SAETrainingArguments(per_device_train_batch_size=96 // num_processes, use_cpu=True))
        run.device, run.rank, run.num_processes = DEVICE, rank, num_processes
        loader = CacheLoader(run, cache, cache.sites, skip_rows=0)
        gathered.clear()
        found[rank, num_processes] = [batch.cpu() for _ in range(9) for batch in next(loader).values()]
        assert sum(gathered) == 9 * 96 // num_processes
    for whole, *parts in zip(*found.values(), strict=True):
        assert torch.equal(torch.cat(parts), whole)


@pytest.mark.skipif(not INTERPRETED, reason="runs in Triton's interpreter (see tests/modeling/test_triton_ops.py)")
@pytest.mark.parametrize("bf16", [False, True])
def test_a_step_with_the_kernels(gpu, bf16: bool) -> None:
    from hf_msae.modeling import triton_ops, triton_rows

    with interpreted_kernels(triton_ops, gpu), interpreted_kernels(triton_rows, gpu):
        there = make_learner(DEVICE, tokens=12, bf16=bf16)
        given = [x[:12].to(DEVICE) for x in batches(2)]
        there.start(given[0])
        there.step(given[0], 0)
        gpu.clear()
        there.silent_tokens[:30] = 10**6
        there.step(given[1], 1)
    here = make_learner(torch.device("cpu"), tokens=12, bf16=bf16)
    given = [x[:12] for x in batches(2)]
    here.start(given[0])
    here.step(given[0], 0)
    here.silent_tokens[:30] = 10**6
    here.step(given[1], 1)
    launched = {name for name in gpu.operations if name.startswith("triton.")}
    assert launched == {f"triton.{name}" for name in KERNELS}
    assert gpu.nondeterministic == []
    assert [event.function for event in gpu.syncs] == ["compact_above", "forward"]
    # Of bfloat16, decoder rows are read, too, and on the CPU they are not.
    assert_nearly_the_same(there, here, 1e-2 if bf16 else 1e-3)
