"""What a run will need, told before it begins: memory by what takes it, disk, steps, and, after a probe, time.

Sizes are counted from shapes, not measured, so that a plan costs nothing and exists before the first allocation. What
comes and goes (a forward pass of the language model, a step's temporaries, measuring on held-out tokens) is not there
at the same time, so only the largest of these counts. Libraries' own buffers are allowed for with a constant. How
the sum compares with measured peaks stands in docs/training.md.
"""

import logging
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import torch
from transformers import PreTrainedModel

from hf_msae.cross_entropy import predicts_next_token
from hf_msae.errors import InputError
from hf_msae.modeling import MatryoshkaSAE
from hf_msae.modeling.modeling_matryoshka_sae import MEASURED_COPIES
from hf_msae.modeling.sparse_encoder import tile_shape, tokens_at_once
from hf_msae.sites import Site
from hf_msae.training.arguments import SAETrainingArguments
from hf_msae.training.held_out import HeldOut
from hf_msae.training.learner import Learner
from hf_msae.training.loaders import ActivationLoader, CacheLoader
from hf_msae.training.run import Run

logger = logging.getLogger(__name__)

MB, GB = 10**6, 10**9
FLOAT, DOUBLE = 4, 8
# Code and configurations of a saved SAE, and metrics beside it.
SMALL_FILES = 200_000
# Libraries load parts of themselves, and keep buffers, when they are first used.
LIBRARIES = {"cpu": 120 * MB, "cuda": 600 * MB}
PROBE_STEPS = 3


@dataclass(frozen=True)
class Plan:
    """Bytes, steps and tokens of a run.

    Attributes:
        device: The device of one process.
        steps: Optimizer steps.
        tokens_per_step: Activation vectors of a step, of all processes.
        before: What the process holds already: libraries, the language model, the SAEs' weights where they are on the
            device.
        kept: What the run adds to that and keeps, by what takes it.
        passing: What comes and goes, of which one thing at a time is there.
        capacity: What the device has, for all processes on it.
        sharers: How many processes these are.
        checkpoint: Size of one checkpoint.
        disk_needed: Size of all that lies on the output directory's disk at once.
        disk_free: What is free there.
    """

    device: str
    steps: int
    tokens_per_step: int
    before: int
    kept: Mapping[str, int]
    passing: Mapping[str, int]
    capacity: int
    sharers: int
    checkpoint: int
    disk_needed: int
    disk_free: int

    @property
    def tokens(self) -> int:
        """Activation vectors of the whole run."""
        return self.steps * self.tokens_per_step

    @property
    def peak(self) -> int:
        """Expected peak of one process."""
        return self.before + sum(self.kept.values()) + max(self.passing.values())

    def warnings(self) -> list[str]:
        """What will not fit, and what to do."""
        found = []
        if self.peak * self.sharers > self.capacity:
            each = f" in each of {self.sharers} processes" if self.sharers > 1 else ""
            found.append(
                f"The run is expected to need {self.peak / GB:.1f} GB of memory{each}, and {self.device} has "
                f"{self.capacity / GB:.1f} GB for it. Lower block_tokens, lm_batch_size, num_latents or the batch."
            )
        if self.disk_needed > self.disk_free:
            found.append(
                f"The run needs {self.disk_needed / GB:.1f} GB of disk, and {self.disk_free / GB:.1f} GB are free. "
                "Lower save_total_limit, or choose another output directory."
            )
        return found

    def warn(self) -> None:
        """Log what will not fit."""
        for words in self.warnings():
            logger.warning(words)

    def rows(self) -> list[tuple[str, str]]:
        """Names and values for people."""
        memory = {"held already (model, libraries)": self.before, **self.kept}
        rows = [("steps", f"{self.steps:,}"), ("tokens", f"{self.tokens:,} ({self.tokens_per_step:,} a step)")]
        rows += [(f"memory: {name}", _size(size)) for name, size in memory.items()]
        rows += [(f"for a while: {name}", _size(size)) for name, size in self.passing.items()]
        rows.append((f"expected peak on {self.device}", f"{_size(self.peak)} of {_size(self.capacity)}"))
        rows.append(("a checkpoint", _size(self.checkpoint)))
        rows.append(("disk in all", f"{_size(self.disk_needed)} of {_size(self.disk_free)} free"))
        return rows


def _size(size: int) -> str:
    return f"{size / GB:,.2f} GB" if size >= GB else f"{size / MB:,.1f} MB"


def make_plan(
    run: Run,
    model: PreTrainedModel | None,
    saes: Mapping[str, MatryoshkaSAE],
    sites: tuple[Mapping[str, Site], Mapping[str, Site]],
    loader: ActivationLoader,
    steps: int,
) -> Plan:
    """Count what a run with these parts will need.

    Args:
        run: The run.
        model: The language model; None where activations come from a cache.
        saes: SAEs by name.
        sites: Sites by the SAEs' names: what they read, and what they reconstruct.
        loader: What is trained on.
        steps: Optimizer steps.

    Returns:
        The plan.
    """
    args, device = run.args, run.device
    window = max((sae.config.context_length or 1 for sae in saes.values()), default=1)
    pass_tokens = args.lm_batch_size * window if model is not None else args.per_device_train_batch_size
    state = _state_bytes(saes)
    here = all(sae.device == device for sae in saes.values())
    kept = {} if here else {"SAE weights": state["weights"]}
    kept |= {"gradients": state["gradients"], "optimizer": state["optimizer"], "counters": state["counters"]}
    kept["activation buffers"] = _buffer_bytes(model, saes, sites, loader, args, steps)
    kept["libraries' buffers"] = LIBRARIES.get(device.type, 0)
    passing = {"a step": max(_step_bytes(sae, args, device) for sae in saes.values())}
    passing["measuring"] = max(_measuring_bytes(model, sae, args, pass_tokens, device) for sae in saes.values())
    if args.cuda_graphs:  # their memory is never given back
        kept["graphs of steps"] = passing.pop("a step")
    if model is not None:
        passing["the language model's pass"] = _pass_bytes(model, pass_tokens)
        if args.kl_from is not None:
            passing["the way back through it"] = _way_back_bytes(model, pass_tokens) + state["gradients"]
    result = state["weights"] + SMALL_FILES * len(saes)
    checkpoint = result + state["optimizer"] + state["counters"]
    return Plan(
        device=str(device),
        steps=steps,
        tokens_per_step=run.tokens_per_step,
        before=_held(device),
        kept=kept,
        passing=passing,
        capacity=_capacity(device),
        sharers=run.num_processes if device.type == "cpu" else 1,
        checkpoint=checkpoint,
        disk_needed=result + checkpoint * _checkpoints_at_once(args, steps),
        disk_free=_free_disk(run.output_dir),
    )


def _state_bytes(saes: Mapping[str, MatryoshkaSAE]) -> dict[str, int]:
    """Of all SAEs together, in float32."""
    trained = sum(parameter.numel() for sae in saes.values() for parameter in sae.parameters())
    statistics = sum(buffer.numel() for sae in saes.values() for buffer in sae.buffers())
    latents = sum(sae.config.num_latents for sae in saes.values())
    return {
        "weights": FLOAT * (trained + statistics),
        "gradients": FLOAT * trained,
        "optimizer": 2 * FLOAT * trained,
        "counters": DOUBLE * latents,
    }


def _buffer_bytes(
    model: PreTrainedModel | None,
    saes: Mapping[str, MatryoshkaSAE],
    sites: tuple[Mapping[str, Site], Mapping[str, Site]],
    loader: ActivationLoader,
    args: SAETrainingArguments,
    steps: int,
) -> int:
    """Blocks of activations: the one that is used and the one that is made, and the order of their tokens."""
    read, written = sites
    widths = {read[name]: sae.config.hidden_size for name, sae in saes.items()}
    widths |= {written[name]: sae.config.output_size for name, sae in saes.items()}
    if isinstance(loader, CacheLoader):
        shards = loader.cache.index["shards"]
        tokens = args.eval_tokens + args.calibration_tokens + max(shard["num_tokens"] for shard in shards)
        return tokens * (sum(widths.values()) * FLOAT + DOUBLE)
    if model is None:
        raise InputError("A plan for text needs the language model.")
    window = max(sae.config.context_length or 1 for sae in saes.values())
    tokens = args.block_tokens + window
    blocks = 2 if steps * args.tokens_per_process > args.block_tokens else 1
    return blocks * tokens * (sum(widths.values()) * model.dtype.itemsize + DOUBLE)


def _step_bytes(sae: MatryoshkaSAE, args: SAETrainingArguments, device: torch.device) -> int:
    """Pre-activations come in tiles; the levels' errors and their gradients are (batch, levels, hidden_size).

    With bfloat16 there is a copy of the encoder, and on a GPU, whose kernels read it, one of the decoder.
    """
    config, batch = sae.config, args.per_device_train_batch_size
    tokens, parts = tile_shape(batch, config.num_latents, device)
    tile = tokens * config.num_latents // parts
    activations = batch * config.output_size
    if config.activation in ("batch_topk", "topk"):
        active = round(config.k * batch)
    else:
        active = batch * config.num_latents // 10
    places = active * (4 * DOUBLE + 4 * FLOAT)
    width = config.hidden_size + (config.output_size if device.type == "cuda" else 0)
    copies = config.num_latents * width * FLOAT // 2 if args.bf16 else 0
    return 2 * FLOAT * tile + activations * (FLOAT + 2 * DOUBLE + 3 * FLOAT * config.num_levels) + places + copies


def _measuring_bytes(
    model: PreTrainedModel | None, sae: MatryoshkaSAE, args: SAETrainingArguments, tokens: int, device: torch.device
) -> int:
    """What measuring takes.

    Latents of as many tokens as are measured at once, which threshold and selection copy; every level's reconstruction
    of a pass's tokens; several sets of logits.
    """
    config = sae.config
    at_once = min(tokens, tokens_at_once(MEASURED_COPIES * config.num_latents, device))
    latents = at_once * config.num_latents * (4 * FLOAT + 1)
    levels = tokens * config.output_size * (config.num_levels * 2 * FLOAT + 3 * DOUBLE)
    if model is None or not predicts_next_token(model) or not args.ce_tokens:
        return latents + levels
    vocabulary = model.config.get_text_config().vocab_size
    logits = 4 * tokens * vocabulary * model.dtype.itemsize + 4 * 1024 * vocabulary * FLOAT
    return max(latents, logits) + levels


def _pass_bytes(model: PreTrainedModel, tokens: int) -> int:
    """A layer's inputs, attention and the widest part of its MLP, without gradients."""
    config = model.config.get_text_config().to_dict()
    hidden = next(iter(model.get_input_embeddings().parameters())).shape[-1]
    inner = config.get("intermediate_size") or 4 * hidden
    return tokens * (8 * hidden + 3 * inner) * model.dtype.itemsize


def _way_back_bytes(model: PreTrainedModel, tokens: int) -> int:
    """Of end-to-end fine-tuning: what every layer keeps for its gradient, and the logits of both runs with theirs."""
    config = model.config.get_text_config()
    logits = 3 * tokens * config.vocab_size * model.dtype.itemsize + 4 * 1024 * config.vocab_size * FLOAT
    return config.num_hidden_layers * _pass_bytes(model, tokens) + logits


def _checkpoints_at_once(args: SAETrainingArguments, steps: int) -> int:
    """One more than are kept: the oldest goes when the newest is whole."""
    if not args.save_steps:
        return 0
    written = -(-steps // args.save_steps)
    return written if args.save_total_limit is None else min(written, args.save_total_limit + 1)


def _held(device: torch.device) -> int:
    """What this process holds of a device, with all of the weights that it has loaded.

    Weights on the CPU are mapped from their files, and take memory from the first pass on that uses them.
    """
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    maps = Path("/proc/self/smaps")
    return _resident() + (1024 * _unread_weights(maps) if maps.is_file() else 0)


def _unread_weights(maps: Path) -> int:
    """How much of mapped weights is not in memory yet, in kB."""
    unread, of_weights = 0, False
    for line in maps.read_text(encoding="utf-8", errors="replace").splitlines():
        name, *values = line.split(maxsplit=1)
        if not name.endswith(":"):  # the head of a mapping, whose last word is its file
            of_weights = line.endswith(".safetensors") or "/blobs/" in line  # as the Hub's cache names files
        elif of_weights and name in ("Size:", "Rss:"):
            unread += int(values[0].split()[0]) * (1 if name == "Size:" else -1)
    return unread


def _resident() -> int:
    """What of this process is in memory."""
    status = Path("/proc/self/status")
    if status.is_file():
        return 1024 * _number(status, "VmRSS")
    import resource  # where there is no /proc: the peak so far. Windows has neither.

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _capacity(device: torch.device) -> int:
    """What this process holds of a device, and what is free there."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    if not Path("/proc/meminfo").is_file():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = 1024 * _number(Path("/proc/meminfo"), "MemAvailable") + _resident()
    limit = Path("/sys/fs/cgroup/memory.max")  # a container's
    limited = limit.is_file() and limit.read_text(encoding="utf-8").strip() != "max"
    return min(free, int(limit.read_text(encoding="utf-8"))) if limited else free


def _number(path: Path, name: str) -> int:
    """The number that follows a name in one of the kernel's tables."""
    return next(
        int(line.split()[1]) for line in path.read_text(encoding="utf-8").splitlines() if line.startswith(f"{name}:")
    )


def _free_disk(output_dir: Path) -> int:
    existing = next(path for path in (output_dir.absolute(), *output_dir.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


# Time


@dataclass(frozen=True)
class Probe:
    """Tokens per second, of all processes together.

    Attributes:
        language_model: Of the language model's pass; None where there is none.
        steps: Of the SAEs' steps.
    """

    language_model: float | None
    steps: float

    @property
    def tokens_per_second(self) -> float:
        """Of the run, in which the one follows the other."""
        return 1 / (1 / self.steps + (1 / self.language_model if self.language_model else 0))


def probe(run: Run, learners: Sequence[Learner], held_out: HeldOut) -> Probe:
    """Time a few passes and steps, on held-out activations.

    Args:
        run: The run.
        learners: They are of no use afterwards.
        held_out: Where activations come from.

    Returns:
        The rates.
    """
    passes, seconds = [], []
    rows, batch, device = 0, run.args.tokens_per_process, run.device
    began = time.perf_counter()
    for activations in held_out.calibration():
        _wait(device)
        seconds.append(time.perf_counter() - began)
        passes.append(activations)
        rows += len(next(iter(activations.values())))
        if rows >= batch and len(passes) > PROBE_STEPS:
            break
        began = time.perf_counter()
    # The first of each is slower than those that follow.
    timed = passes[1:] or passes
    rate = sum(len(next(iter(part.values()))) for part in timed) / max(sum(seconds[-len(timed) :]), 1e-9)
    step_seconds = []
    for step in range(1 + PROBE_STEPS):
        began = time.perf_counter()
        for learner in learners:
            learner.take({site: _filled([part[site] for part in passes], batch) for site in learner.needed}, step)
        _wait(device)
        step_seconds.append(time.perf_counter() - began)
    return Probe(rate * run.num_processes, run.tokens_per_step * PROBE_STEPS / sum(step_seconds[1:]))


def _filled(parts: Sequence[torch.Tensor], rows: int) -> torch.Tensor:
    """A batch of exactly `rows`, with some of them repeated where there are fewer."""
    taken, missing = [], rows
    for part in cycle(parts):
        taken.append(part[:missing])
        missing -= len(taken[-1])
        if missing == 0:
            return torch.cat(taken)
    raise AssertionError("a cycle does not end")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
