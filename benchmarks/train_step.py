"""What one training step of an SAE costs, in time and in memory: ours beside the encoder's bare product and the peers.

    python benchmarks/train_step.py --threads 2 --memory --json step.json

Every contender takes whole steps, as its own trainer takes them: forward, backward, clipping and projections where it
has them, Adam, the decoder's normalisation, the counters of silent latents. Weights are fp32; `--dtype bf16` is
autocast. All see the same activations, another batch each round: a few strong directions and noise, so that latents
fire unevenly, as they do on a language model.

Time: everyone takes one step a round, in turn, so that a slow moment of the machine falls on all; medians are
reported. What costs time only at the beginning (initialisation, the optimizer's first step) is in the warm-up rounds
and dropped. No latent counts as dead to any contender in so few steps, so nobody pays for an auxiliary loss.

Memory: a process of its own for each contender takes one step, so that parameters and optimizer state exist, and is
measured during the second. `step` is the peak less what was held before that step: gradients, pre-activations and all
else that a step needs for a while. `held` is what lies there between steps beyond parameters and optimizer state
(counters, buffers, what a library keeps). On CUDA these are the allocator's own numbers; on the CPU they are resident
memory, good to some ten MB, with the C library told to give freed blocks back, so that none is filled unseen.
"""

import argparse
import gc
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.sites import Site
from hf_msae.training import SAETrainingArguments
from hf_msae.training.learner import Learner

# The length that schedules are told; no run here gets so far.
MAX_STEPS = 10_000
MB = 1e6


@dataclass(frozen=True)
class Setting:
    """One step's sizes, and where it runs."""

    batch_size: int
    hidden_size: int
    num_latents: int
    k: int
    levels: int
    device: str
    bf16: bool

    def __post_init__(self) -> None:
        smallest = 2 ** (self.levels - 1)
        if self.levels < 1 or self.num_latents < smallest:
            raise ValueError(
                f"Each level halves the dictionary, so {self.levels} levels need at least 1 level and {smallest:g} "
                f"latents, got {self.num_latents}; take fewer levels or more latents."
            )

    @property
    def prefix_sizes(self) -> list[int]:
        """num_latents and its halves, as many as there are levels."""
        return [self.num_latents >> inward for inward in reversed(range(self.levels))]


class Contender(NamedTuple):
    """`step` takes a batch (batch_size, hidden_size) and its number from 0; `state` gives what outlasts a step."""

    step: Callable[[Tensor, int], object]
    state: Callable[[], Iterable[Tensor]]


class Entry(NamedTuple):
    """How a contender is called, what builds it from a setting and its first batch, and where it comes from."""

    label: str
    build: Callable[[Setting, Tensor], Contender]
    module: str | None = None
    distribution: str | None = None

    def version(self) -> str | None:
        """Version of the installed peer; None where it is absent. The distribution's name decides, since another
        project's distribution installs a module `sparsify`, too.
        """
        return next((found.version for found in metadata.distributions(name=self.distribution)), None)


def activations(setting: Setting, count: int) -> list[Tensor]:
    """`count` batches (batch_size, hidden_size): a mean, an eighth of all directions with falling strength, noise."""
    generator = torch.Generator().manual_seed(0)
    rank = max(1, setting.hidden_size // 8)
    strengths = torch.arange(1, rank + 1).pow(-0.5)
    directions = torch.randn(rank, setting.hidden_size, generator=generator)
    mean = torch.randn(setting.hidden_size, generator=generator)
    batches = []
    for _ in range(count):
        common = torch.randn(setting.batch_size, rank, generator=generator) * strengths
        noise = torch.randn(setting.batch_size, setting.hidden_size, generator=generator)
        batches.append((mean + common @ directions + 0.5 * noise).to(setting.device))
    return batches


def with_optimizer(parameters: Iterable[Tensor], optimizer: torch.optim.Optimizer) -> Iterable[Tensor]:
    yield from parameters
    for state in optimizer.state.values():
        yield from (value for value in state.values() if torch.is_tensor(value))


# Contenders


def bare_product(setting: Setting, first: Tensor) -> Contender:
    """The encoder's product alone, in the precision in which a step makes it."""
    dtype = torch.bfloat16 if setting.bf16 else torch.float32
    W_enc = torch.randn(setting.num_latents, setting.hidden_size, device=setting.device, dtype=dtype)

    @torch.no_grad()
    def step(x: Tensor, number: int) -> Tensor:
        return torch.nn.functional.linear(x.to(dtype), W_enc)

    return Contender(step, lambda: [W_enc])


def _learner(setting: Setting, first: Tensor, prefix_sizes: list[int]) -> Contender:
    config = MatryoshkaSAEConfig(
        hidden_size=setting.hidden_size, num_latents=setting.num_latents, prefix_sizes=prefix_sizes, k=setting.k
    )
    on_cpu = torch.device(setting.device).type == "cpu"
    args = SAETrainingArguments(
        per_device_train_batch_size=setting.batch_size,
        max_steps=MAX_STEPS,
        bf16=setting.bf16,
        use_cpu=on_cpu,
        dead_after_tokens=10_000_000,
    )
    accelerator = Accelerator(cpu=on_cpu)
    sae = MatryoshkaSAE(config).to(setting.device)
    learner = Learner("sae", sae, Site("layers.0"), args, MAX_STEPS, accelerator)
    learner.start(first)
    assert learner.optimizer is not None
    optimizer = learner.optimizer
    return Contender(learner.step, lambda: with_optimizer(sae.parameters(), optimizer))


def ours(setting: Setting, first: Tensor) -> Contender:
    return _learner(setting, first, setting.prefix_sizes)


def ours_plain(setting: Setting, first: Tensor) -> Contender:
    return _learner(setting, first, [setting.num_latents])


def saelens(setting: Setting, first: Tensor) -> Contender:
    """`SAETrainer.step`, which `fit` calls for each batch."""
    from sae_lens import MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    config = MatryoshkaBatchTopKTrainingSAEConfig(
        d_in=setting.hidden_size,
        d_sae=setting.num_latents,
        k=setting.k,
        matryoshka_widths=setting.prefix_sizes,
        device=setting.device,
    )
    trainer_config = SAETrainerConfig(
        total_training_samples=MAX_STEPS * setting.batch_size,
        train_batch_size_samples=setting.batch_size,
        device=setting.device,
        autocast=setting.bf16,
    )
    sae = MatryoshkaBatchTopKTrainingSAE(config)
    trainer = SAETrainer(trainer_config, sae, data_provider=iter(()))

    def step(x: Tensor, number: int) -> None:
        trainer.step(x)
        trainer.n_training_steps += 1

    return Contender(step, lambda: with_optimizer(sae.parameters(), trainer.optimizer))


def dictionary_learning(setting: Setting, first: Tensor) -> Contender:
    """`MatryoshkaBatchTopKTrainer.update`, under autocast as in its `trainSAE`, with the threshold estimated from the
    beginning and not from step 1,000, since most steps of a run are later.
    """
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer

    sizes = setting.prefix_sizes
    groups = [size - inner for size, inner in zip(sizes, [0, *sizes], strict=False)]
    trainer = MatryoshkaBatchTopKTrainer(
        steps=MAX_STEPS,
        activation_dim=setting.hidden_size,
        dict_size=setting.num_latents,
        k=setting.k,
        layer=0,
        lm_name="",
        group_fractions=[group / setting.num_latents for group in groups],
        threshold_start_step=0,
        device=setting.device,
    )

    def step(x: Tensor, number: int) -> None:
        with autocast(setting):
            trainer.update(number, x.to(torch.bfloat16) if setting.bf16 else x)

    return Contender(step, lambda: with_optimizer(trainer.ae.parameters(), trainer.optimizer))


def sparsify(setting: Setting, first: Tensor) -> Contender:
    """The step inside `Trainer.fit`, which cannot be had without a language model, with its defaults and torch's Adam.
    A plain TopK SAE: sparsify has no levels. On CUDA its forward pass is bf16 whatever `--dtype` says.
    """
    from sparsify import SparseCoder, SparseCoderConfig
    from transformers import get_linear_schedule_with_warmup

    config = SparseCoderConfig(num_latents=setting.num_latents, k=setting.k)
    sae = SparseCoder(setting.hidden_size, config, device=setting.device, dtype=torch.float32)
    sae.b_dec.data = first.mean(0)
    optimizer = torch.optim.Adam(sae.parameters(), lr=2e-4 / (setting.num_latents / 2**14) ** 0.5)
    scheduler = get_linear_schedule_with_warmup(optimizer, 1_000, MAX_STEPS)
    silent_tokens = torch.zeros(setting.num_latents, dtype=torch.long, device=setting.device)
    fired = torch.zeros(setting.num_latents, dtype=torch.bool, device=setting.device)

    def step(x: Tensor, number: int) -> float:
        sae.set_decoder_norm_to_unit_norm()
        total_variance = (x - x.mean(0)).pow(2).sum()
        with autocast(setting):
            output = sae(x=x, y=x, total_variance=total_variance)
        fired[output.latent_indices.flatten()] = True
        logged = float(output.fvu.detach())
        output.fvu.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        silent_tokens.add_(x.shape[0])
        silent_tokens[fired] = 0
        fired.zero_()
        return logged

    return Contender(step, lambda: with_optimizer(sae.parameters(), optimizer))


def autocast(setting: Setting) -> torch.autocast:
    return torch.autocast(torch.device(setting.device).type, torch.bfloat16, enabled=setting.bf16)


CONTENDERS = {
    "gemm": Entry("encoder product alone", bare_product),
    "ours-plain": Entry("ours, 1 level", ours_plain),
    "ours": Entry("ours, {levels} levels", ours),
    "saelens": Entry("SAELens, {levels} levels", saelens, "sae_lens", "sae-lens"),
    "dictionary_learning": Entry(
        "dictionary_learning, {levels} levels", dictionary_learning, "dictionary_learning", "dictionary-learning"
    ),
    "sparsify": Entry("sparsify, plain TopK", sparsify, "sparsify", "eai-sparsify"),
}


# Time


def seconds(contender: Contender, batch: Tensor, number: int) -> float:
    """How long one step takes, until the device is done with it."""
    if batch.is_cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    contender.step(batch, number)
    if batch.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def interleaved(
    contenders: dict[str, Contender], batches: dict[str, Sequence[Tensor]], warmup: int
) -> dict[str, list[float]]:
    """Seconds of each contender's steps, one a round and in turn, without the first `warmup` rounds."""
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(len(next(iter(batches.values())))):
        for name, contender in contenders.items():
            taken[name].append(seconds(contender, batches[name][number], number))
    return {name: values[warmup:] for name, values in taken.items()}


# Memory


def resident(field: str) -> int:
    """Bytes of this process's memory: VmRSS is what it holds, VmHWM its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


class Meter:
    """Reads what is held, and the peak since `reset`."""

    def __init__(self, device: str) -> None:
        self.cuda = torch.device(device).type == "cuda"

    def held(self) -> int:
        gc.collect()
        return torch.cuda.memory_allocated() if self.cuda else resident("VmRSS")

    def reset(self) -> None:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated() if self.cuda else resident("VmHWM")


def memory(name: str, setting: Setting, threads: int) -> dict[str, float]:
    """MB that one step of a contender takes, that are held between steps, and of parameters and optimizer state;
    only meaningful in a process that has done nothing else.
    """
    torch.set_num_threads(threads)
    entry, meter = CONTENDERS[name], Meter(setting.device)
    if entry.module is not None:
        import_module(entry.module)
    batches = activations(setting, 2)
    empty = meter.held()
    contender = entry.build(setting, batches[0])
    contender.step(batches[0], 0)
    before = meter.held()
    meter.reset()
    contender.step(batches[1], 1)
    peak = meter.peak()
    state = sum(tensor.numel() * tensor.element_size() for tensor in contender.state())
    return {"step": (peak - before) / MB, "held": (before - empty - state) / MB, "state": state / MB}


def memory_of_each(names: Sequence[str], setting: Setting, threads: int) -> dict[str, dict[str, float]]:
    # Read by the C library of the processes started below: blocks of 1 MB and more go back when they are freed.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = os.environ["MALLOC_TRIM_THRESHOLD_"] = str(2**20)
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        return {name: pool.apply(memory, (name, setting, threads)) for name in names}


# Report


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_setting(parser)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1, help="rounds before those that count")
    parser.add_argument("--only", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--memory", action="store_true", help="measure each contender's memory, too")
    parser.add_argument("--json", help="write the numbers here, too")
    options = parser.parse_args()
    check_rounds(parser, options)
    on_cpu = torch.device(options.device).type == "cpu"
    if options.memory and on_cpu and platform.system() != "Linux":
        parser.error("--memory on the CPU reads /proc, which only Linux has; leave it out or take --device cuda.")
    return options


def add_setting(parser: argparse.ArgumentParser) -> None:
    """The options that make a Setting."""
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--hidden-size", type=int, default=768)
    parser.add_argument("--num-latents", type=int, default=16384)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--levels", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())


def check_rounds(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.repeats < 1 or options.warmup < 1:
        parser.error(f"--repeats and --warmup must be at least 1, got {options.repeats} and {options.warmup}.")
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU; take --device cpu.")


def setting_of(options: argparse.Namespace) -> Setting:
    return Setting(
        batch_size=options.batch_size,
        hidden_size=options.hidden_size,
        num_latents=options.num_latents,
        k=options.k,
        levels=options.levels,
        device=options.device,
        bf16=options.dtype == "bf16",
    )


def where(options: argparse.Namespace) -> str:
    if torch.device(options.device).type == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU, {options.threads} threads"


def ratios(values: dict[str, float]) -> dict[str, float]:
    """Ours over the bare product and over the plain SAE, and each peer over ours, of those that were measured."""
    pairs = [("ours", "gemm"), ("ours", "ours-plain")]
    pairs += [(name, "ours") for name, entry in CONTENDERS.items() if entry.distribution]
    return {f"{a}/{b}": values[a] / values[b] for a, b in pairs if a in values and b in values}


def table(result: dict[str, Any], levels: int) -> None:
    tokens = result["setting"]["batch_size"]
    print(f"{'':36}{'s/step':>9}{'from':>9}{'to':>9}{'tokens/s':>11}{'step MB':>10}{'held MB':>9}")
    for name, median in result["seconds"].items():
        values, used = result["all_seconds"][name], result["memory"].get(name)
        label = CONTENDERS[name].label.format(levels=levels)
        print(f"{label:36}{median:9.4f}{min(values):9.4f}{max(values):9.4f}{tokens / median:11,.0f}", end="")
        print(f"{used['step']:10,.0f}{used['held']:9,.0f}" if used else "")
    for kind in ("time", "memory"):
        for pair, ratio in result["ratios"][kind].items():
            print(f"{kind:7} {pair:28}{ratio:8.2f}")


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    setting = setting_of(options)
    peers = {name: entry for name, entry in CONTENDERS.items() if name in options.only and entry.distribution}
    versions = {name: entry.version() for name, entry in peers.items()}
    skipped = {
        name: f"{peers[name].distribution} is not installed" for name, version in versions.items() if version is None
    }
    names = [name for name in CONTENDERS if name in options.only and name not in skipped]
    for name, reason in skipped.items():
        print(f"skipped {name}: {reason}")
    if not names:
        raise SystemExit("Nothing is left to measure; install the peers with `pip install hf-msae[benchmarks]`.")
    used = memory_of_each(names, setting, options.threads) if options.memory else {}
    batches = activations(setting, options.warmup + options.repeats)
    contenders = {name: CONTENDERS[name].build(setting, batches[0]) for name in names}
    taken = interleaved(contenders, dict.fromkeys(names, batches), options.warmup)
    medians = {name: statistics.median(values) for name, values in taken.items()}
    result = {
        "where": where(options),
        "setting": asdict(setting),
        "versions": {"torch": torch.__version__} | {name: found for name, found in versions.items() if found},
        "skipped": skipped,
        "seconds": medians,
        "all_seconds": taken,
        "memory": used,
        "ratios": {
            "time": ratios(medians),
            "memory": ratios({name: values["step"] for name, values in used.items()}),
        },
    }
    print(f"{result['where']}, {options.dtype}, {setting}, medians of {options.repeats}")
    table(result, setting.levels)
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
