"""The checks of `gpu_check.py`: each says in its first line what holds, and raises where it does not."""

import os
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_check import Check, Place, Skipped
from hf_msae.modeling.devices import runs_kernels
from torch import Tensor
from torch.nn.functional import embedding_bag

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.data import ActivationStream, TokenWindows, as_documents
from hf_msae.devices import move_language_model
from hf_msae.language_models import load_language_model
from hf_msae.sites import Site, resolve_site
from hf_msae.training import SAETrainer, SAETrainingArguments
from hf_msae.training.learner import Learner
from hf_msae.training.learner_files import read_learner, write_model, write_state
from hf_msae.training.run import Run
from hf_msae.worlds.stories import StoryWorld

ACTIVATIONS = ("batch_topk", "topk", "jumprelu", "relu")
CPU = torch.device("cpu")
# (tokens of a batch, width, latents): where products rule, and where launches do.
SIZES = ((8192, 2304, 65536), (4096, 768, 16384))
SMALL = (64, 16, 128)
MAX_SYNCS = 2
MAX_STEPS = 1000


# What checks are made of


def activations(size: tuple[int, int, int], count: int, device: torch.device) -> list[Tensor]:
    """Batches with a mean, an eighth of all directions with falling strength, and noise."""
    batch, width, _ = size
    generator = torch.Generator().manual_seed(0)
    strengths = torch.arange(1, width // 8 + 1).pow(-0.5)
    directions = torch.randn(width // 8, width, generator=generator)
    mean = torch.randn(width, generator=generator)
    found = []
    for _ in range(count):
        common = torch.randn(batch, width // 8, generator=generator) * strengths
        found.append((mean + common @ directions + 0.5 * torch.randn(batch, width, generator=generator)).to(device))
    return found


def make_learner(device: torch.device, size: tuple[int, int, int], activation: str, **changes: Any) -> Learner:
    """The same at every call, on a device."""
    torch.manual_seed(0)
    batch, width, latents = size
    sizes = [latents >> inward for inward in reversed(range(5))]
    k = changes.pop("k", 32 if latents > 1024 else 4)
    sae = MatryoshkaSAE(
        MatryoshkaSAEConfig(hidden_size=width, num_latents=latents, prefix_sizes=sizes, k=k, activation=activation)
    )
    options = {"bf16": False, "tf32": False, "dead_after_tokens": 10**9, "save_steps": 0} | changes
    run = Run(SAETrainingArguments(per_device_train_batch_size=batch, use_cpu=device.type == "cpu", **options))
    run.device = device
    return Learner("sae", sae, Site("layers.0"), run, MAX_STEPS)


def kill(learner: Learner, share: float) -> None:
    """Have a share of the latents count as dead."""
    learner.silent_tokens[: round(share * len(learner.silent_tokens))] = 2 * 10**9


def whole_state(learner: Learner) -> dict[str, Tensor]:
    """All that the next step depends on."""
    rest = learner.state_dict()["optimizer"]["b_dec"] | learner.moments
    return {**learner.sae.state_dict(), **learner.latent_state(), **{f"rest.{name}": t for name, t in rest.items()}}


def check_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Raises `AssertionError` naming the tensors that differ in any bit."""
    different = [name for name, tensor in expected.items() if not torch.equal(found[name].cpu(), tensor.cpu())]
    assert not different, f"{', '.join(different)} differ"


@contextmanager
def counted_syncs(device: torch.device) -> Iterator[list[str]]:
    """Where the CPU waits for the GPU, as CUDA's debug mode tells it."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found += [f"{Path(one.filename).name}:{one.lineno}" for one in told if "synchronizing" in str(one.message)]


def size_of(place: Place) -> tuple[int, int, int]:
    return SMALL if place.small else (2048, 768, 16384)


# The checks


def compiler(place: Place) -> dict[str, Any]:
    """Triton compiles here, launches, and agrees with torch; without a compiler a step takes torch's operations."""
    place.needs_gpu()
    works = runs_kernels(place.device)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import torch, gpu_checks as g; d = torch.device('cuda', 0); "
        "l = g.make_learner(d, g.SMALL, 'batch_topk'); x = g.activations(g.SMALL, 1, d)[0]; l.start(x); l.step(x, 0)"
    )
    with tempfile.TemporaryDirectory() as cache:
        without = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX")}
        command = [sys.executable, "-c", code, str(Path(__file__).parent)]
        done = subprocess.run(
            command,
            env=without | {"PATH": "", "TRITON_CACHE_DIR": cache},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
    assert done.returncode == 0, f"with an empty PATH a step ends with: {done.stderr[-300:]}"
    assert works, "Triton's kernels do not work here; the reason is above"
    return {"kernels": works, "without a compiler": done.stderr.strip().splitlines()[-1:]}


def kernels(place: Place) -> dict[str, Any]:
    """Triton's kernels give what torch gives in float64, in all their types."""
    place.needs_gpu()
    if not runs_kernels(place.device):
        raise Skipped("Triton's kernels do not work here")
    from hf_msae.modeling import triton_ops, triton_rows

    triton_rows.check_kernels(place.device)
    errors = {}
    generator = torch.Generator(place.device).manual_seed(0)
    lengths = torch.randint(0, 300, (500,), device=place.device, generator=generator)
    bags = torch.arange(500, device=place.device).repeat_interleave(lengths)
    offsets, rows = lengths.cumsum(0) - lengths, torch.randint(0, 4000, bags.shape, device=place.device)
    for dtype in triton_ops.DTYPES:
        for width in (768, 2304, 769):
            table, grads = (torch.randn(n, width, device=place.device).to(dtype) for n in (4000, 500))
            weights = torch.randn(bags.shape, device=place.device).to(dtype)
            expected = embedding_bag(rows, table.double(), offsets, mode="sum", per_sample_weights=weights.double())
            sums = (triton_ops.segment_sum(table, rows, weights, offsets) - expected).abs().max().item()
            dots = triton_ops.segment_dot(grads, table, rows, bags)
            dots = (dots - (grads[bags].double() * table[rows].double()).sum(1)).abs().max().item()
            pre = torch.randn(700, width, device=place.device).to(dtype)
            threshold = torch.ones((), device=place.device)
            above = (pre > threshold.to(dtype)).flatten().nonzero().squeeze(1)
            candidates = triton_ops.compact_above(pre, threshold)
            assert torch.equal(candidates.places, above), f"compact_above, {dtype}"
            count = len(above) // 2
            first = candidates.values.sort(descending=True, stable=True).indices[:count].sort().values
            places, values = triton_ops.compact_largest(candidates.places, candidates.values, count)
            assert torch.equal(places, above[first]), f"compact_largest, {dtype}"
            assert torch.equal(values, candidates.values[first]), f"compact_largest, {dtype}"
            assert max(sums, dots) < 1e-3, f"{dtype}, width {width}: off by {sums:.2g} and {dots:.2g}"
            errors[f"{dtype}, {width}"] = [sums, dots]
    return {"largest errors of sums and dots": errors}


def steps(place: Place) -> dict[str, Any]:
    """A step is that of the CPU: four activations, fp32 and bf16, none, half and all latents dead."""
    size, facts = (SMALL if place.small else (512, 256, 4096)), {}
    wrong = []
    for activation in ACTIVATIONS:
        for bf16 in (False, True):
            for share in (0.0, 0.5, 1.0):
                logs = []
                for device in (place.device, CPU):
                    learner = make_learner(device, size, activation, bf16=bf16)
                    given = activations(size, 2, device)
                    learner.start(given[0])
                    kill(learner, share)
                    learner.step(given[1], 0)
                    log = learner.read_log()
                    logs.append([log["loss"], log["aux_loss"], log["l0"], *log["level_losses"]])
                far = max(abs(a - b) / max(abs(b), 1e-3) for a, b in zip(*logs, strict=True))
                name = f"{activation}, {'bf16' if bf16 else 'fp32'}, {share:.0%} dead"
                facts[name] = far
                if far > (0.05 if bf16 else 1e-3):
                    wrong.append(f"{name}: {far:.2g} apart")
    assert not wrong, "; ".join(wrong)
    return {"largest relative difference of losses and L0": facts}


def bits(place: Place) -> dict[str, Any]:
    """30 steps give the same bits twice, and with a checkpoint after 15."""
    size, count = size_of(place), 6 if place.small else 30
    given = activations(size, count, place.device)

    def train(learner: Learner, begin: int, end: int) -> Learner:
        if begin == 0:
            learner.start(given[0])
        for step in range(begin, end):
            learner.step(given[step], step)
        return learner

    for activation in ACTIVATIONS:
        options = {"bf16": activation != "topk", "dead_after_tokens": 3 * size[0], "sort_latents_at": count - 2}
        expected = whole_state(train(make_learner(place.device, size, activation, **options), 0, count))
        check_equal(whole_state(train(make_learner(place.device, size, activation, **options), 0, count)), expected)
        with tempfile.TemporaryDirectory() as folder:
            half = train(make_learner(place.device, size, activation, **options), 0, count // 2)
            write_model(half, Path(folder))
            write_state(half, Path(folder))
            other = make_learner(place.device, size, activation, **options)
            read_learner(other, Path(folder))
        check_equal(whole_state(train(other, count // 2, count)), expected)
    return {"steps": count, "activations": ACTIVATIONS}


def graphs(place: Place) -> dict[str, Any]:
    """Steps that are replayed from CUDA graphs are those that are computed, to the bit, and sooner done."""
    place.needs_gpu()
    facts: dict[str, Any] = {}
    size, count = (SMALL if place.small else SIZES[1]), 16
    given = activations(size, count, place.device)
    for activation in ("batch_topk", "topk"):
        for bf16 in (False, True):
            options = {"bf16": bf16, "dead_after_tokens": 3 * size[0], "cuda_graphs": True}
            replayed, computed = (make_learner(place.device, size, activation, **options) for _ in range(2))
            assert computed.graphs is not None
            assert replayed.graphs is not None
            computed.graphs.captures = False
            for learner in (replayed, computed):
                learner.start(given[0])
                for step, x in enumerate(given):
                    learner.step(x, step)
            assert replayed.graphs.captures, "a step could not be captured; the reason is above"
            assert replayed.graphs.replays >= count // 4, f"{replayed.graphs.replays} of {count} steps were replayed"
            check_equal(whole_state(replayed), whole_state(computed))
            took = [milliseconds(partial(one.step, given[0], count), place.device) for one in (replayed, computed)]
            facts[f"{activation}, {'bf16' if bf16 else 'fp32'}"] = {"replayed ms": took[0], "computed ms": took[1]}
    return facts


def replayed_run(place: Place) -> dict[str, Any]:
    """A run beside the language model's passes is replayed, too, and is saved."""
    place.needs_gpu()
    with tempfile.TemporaryDirectory() as folder:
        trainer = story_trainer(place, folder, cuda_graphs=True)
        trainer.train()
        found = trainer.learners[0].graphs
        assert found is not None
        assert found.captures, "a step could not be captured; the reason is above"
        return {"steps": trainer.state.global_step, "replays": found.replays}


def ahead(place: Place) -> dict[str, Any]:
    """Batches are the same whether the language model runs ahead, with either stream held up."""
    model, tokenizer = load_language_model("stories")
    model = model.to(place.device)
    site = resolve_site(model, "layers.1")
    texts = list(StoryWorld(seed=0).documents(100 if place.small else 600))

    def read(runs_ahead: bool, slow: str | None) -> list[Tensor]:
        windows = TokenWindows(as_documents(texts), tokenizer, context_length=64)
        stream = ActivationStream(model, [site], windows, batch_size=256, block_tokens=2048, ahead=runs_ahead)
        look = model.register_forward_pre_hook(lambda *_: hold_up(place.device) if slow == "passes" else None)
        found = []
        for batch in stream:
            if slow == "steps":
                hold_up(place.device)
            found.append(batch[site].clone())
        look.remove()
        return found

    expected = read(False, None)
    for slow in (None, "passes", "steps"):
        found = read(True, slow)
        assert len(found) == len(expected) > 4
        assert all(map(torch.equal, found, expected)), f"batches differ where {slow or 'nothing'} is held up"
    return {"batches": len(expected)}


def hold_up(device: torch.device) -> None:
    """Have the current stream do nothing for some milliseconds."""
    if device.type == "cuda":
        torch.cuda._sleep(5_000_000)


def syncs(place: Place) -> dict[str, Any]:
    """A step waits for the GPU twice at most."""
    place.needs_gpu()
    facts, size = {}, size_of(place)
    for activation in ACTIVATIONS:
        learner = make_learner(place.device, size, activation)
        given = activations(size, 3, place.device)
        learner.start(given[0])
        learner.step(given[0], 0)
        kill(learner, 0.1)
        learner.step(given[1], 1)
        kill(learner, 0.1)
        with counted_syncs(place.device) as found:
            learner.step(given[2], 2)
        facts[activation] = found
    many = [f"{name}: {', '.join(found)}" for name, found in facts.items() if len(found) > MAX_SYNCS]
    assert not many, "; ".join(many)
    return facts


def milliseconds(work: Callable[[], object], device: torch.device, repeats: int = 10) -> float:
    """The median time of some work, by the device's own clock where it has one."""
    import time

    times = []
    for _ in range(repeats + 2):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times[2:])


def times(place: Place) -> dict[str, Any]:
    """How long a step takes, beside its product, and where the time goes. (Not a check: numbers alone.)"""
    facts: dict[str, Any] = {}
    for size in (SMALL,) if place.small else SIZES:
        batch, width, latents = size
        given = activations(size, 2, place.device)
        for bf16 in (False, True):
            name = f"{batch} x {width} x {latents}, {'bf16' if bf16 else 'TF32'}"
            try:
                facts[name] = step_times(place, size, given, bf16)
            except torch.OutOfMemoryError:
                facts[name] = "out of memory"
                torch.cuda.empty_cache()
    return facts


def step_times(place: Place, size: tuple[int, int, int], given: list[Tensor], bf16: bool) -> dict[str, Any]:
    """Milliseconds of the product alone, and of steps with latents dead and of jumprelu with 5% active."""
    device, (_, width, latents) = place.device, size
    weights = torch.randn(latents, width, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    x = given[0].to(weights.dtype)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    found: dict[str, Any] = {"product": milliseconds(lambda: torch.nn.functional.linear(x, weights), device)}
    torch.set_float32_matmul_precision(before)
    cases = [("batch_topk", 0.0), ("batch_topk", 0.1), ("batch_topk", 0.4), ("jumprelu", 0.0)]
    for activation, dead in cases:
        k = {"k": 0.05 * latents} if activation == "jumprelu" else {}
        learner = make_learner(device, size, activation, bf16=bf16, tf32=not bf16, **k)
        learner.start(given[0])

        def step(learner: Learner = learner, dead: float = dead) -> None:
            kill(learner, dead)
            learner.step(given[1], 1)

        name = f"{activation}, {dead:.0%} dead" if activation != "jumprelu" else "jumprelu, 5% active"
        found[name] = milliseconds(step, device)
        if (activation, dead) == ("batch_topk", 0.0) and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            step()
            found["peak GB"] = torch.cuda.max_memory_allocated(device) / 1e9
            found["top 20"] = profiled(step)
    return found


def profiled(work: Callable[[], object]) -> list[str]:
    """The twenty kernels that take longest."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        work()
    rows = sorted(profile.key_averages(), key=lambda row: -row.self_device_time_total)
    return [f"{row.self_device_time_total / 1000:.3f} ms, {row.count} x {row.key[:80]}" for row in rows[:20]]


def story_trainer(place: Place, folder: str, **changes: Any) -> SAETrainer:
    """A trainer of an SAE of the story model; the model begins on the CPU."""
    model, tokenizer = load_language_model("stories")
    width = model.config.hidden_size
    latents = 256 if place.small else 8192
    config = MatryoshkaSAEConfig(
        hidden_size=width, num_latents=latents, prefix_sizes=[latents // 4, latents], k=8, site="layers.1"
    )
    settings: dict[str, Any] = {
        "max_steps": 3 if place.small else 20,
        "per_device_train_batch_size": 128 if place.small else 4096,
        "block_tokens": 1024 if place.small else 32_768,
        "context_length": 64,
        "eval_tokens": 500,
        "calibration_tokens": 300,
        "ce_tokens": 200,
        "save_steps": 0,
        "disable_tqdm": True,
        "use_cpu": place.device.type == "cpu",
    }
    args = SAETrainingArguments(output_dir=folder, **(settings | changes))
    texts = list(StoryWorld(seed=0).documents(200 if place.small else 3000))
    return SAETrainer(model, MatryoshkaSAE(config), args, texts, processing_class=tokenizer)


def memory(place: Place) -> dict[str, Any]:
    """A run takes no more memory than its plan says."""
    place.needs_gpu()
    with tempfile.TemporaryDirectory() as folder:
        trainer = story_trainer(place, folder)
        torch.cuda.reset_peak_memory_stats(place.device)
        planned = trainer.plan().peak
        trainer.train()
        measured = torch.cuda.max_memory_allocated(place.device)
    facts = {"planned MB": planned / 1e6, "measured MB": measured / 1e6}
    assert measured <= planned, f"planned {planned / 1e6:,.0f} MB, measured {measured / 1e6:,.0f} MB"
    return facts


def whole(place: Place) -> dict[str, Any]:
    """A run, an interpretation and a steered pipeline, with all that they use on the device."""
    from hf_msae.interpret import interpret
    from hf_msae.steering import LatentEdit, SteeredPipeline, Steering

    with tempfile.TemporaryDirectory() as folder:
        trainer = story_trainer(place, str(Path(folder) / "run"))
        model, tokenizer = trainer.model, trainer.tokenizer
        trainer.train()
        assert trainer.learners[0].sae.device == trainer.run.device, "the SAE was trained elsewhere"
        assert trainer.run.device.type == place.device.type, f"the run is on {trainer.run.device}"
        assert next(model.parameters()).device == trainer.run.device, "the language model was left where it was"
        sae = MatryoshkaSAE.from_pretrained(Path(folder) / "run").eval()
        texts = list(StoryWorld(seed=1).documents(50))
        pages = interpret(model, tokenizer, sae, texts, Path(folder) / "pages", max_tokens=2000)
        assert sae.device == trainer.run.device, "the interpretation left the SAE where it was"
        move_language_model(model, CPU)
        pipe = SteeredPipeline(
            model, tokenizer, sae.to(CPU), Steering([LatentEdit(0, 2.0, units="absolute")]), device=trainer.run.device
        )
        places = {next(pipe.model.parameters()).device, *(one.device for one in pipe.saes.values())}
        assert places == {trainer.run.device}, f"the pipeline is on {places}"
        text = pipe("Once upon a time", max_new_tokens=5, do_sample=False)[0]["generated_text"]
    return {"precision": trainer.args.bf16, "pages": len(pages), "text": text}


def cards(place: Place) -> dict[str, Any]:
    """Two GPUs train together: each a copy, each some of the latents, and one language model split over both."""
    place.needs_gpu()
    if torch.cuda.device_count() < 2:
        raise Skipped("there is one GPU")
    facts = {}
    ways = {"copies": [], "sharded": ["--shard-latents"], "tensor parallel": ["--tensor-parallel"]}
    with tempfile.TemporaryDirectory() as folder:
        for name, flags in ways.items():
            command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "hf_msae.cli"]
            command += ["train", "--num-latents", "1024", "--k", "8", "--max-steps", "20", "--ce-tokens", "0"]
            command += ["--output-dir", str(Path(folder) / name.replace(" ", "-")), "--disable-tqdm", *flags]
            done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
            facts[name] = "works" if done.returncode == 0 else done.stderr[-500:]
    broken = [name for name, words in facts.items() if words != "works"]
    assert not broken, f"{', '.join(broken)}: {facts[broken[0]][-200:]}"
    return facts


CHECKS: dict[str, Check] = {
    "compiler": compiler,
    "kernels": kernels,
    "steps": steps,
    "bits": bits,
    "ahead": ahead,
    "syncs": syncs,
    "graphs": graphs,
    "replayed run": replayed_run,
    "whole": whole,
    "memory": memory,
    "cards": cards,
    "times": times,
}
