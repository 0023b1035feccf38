"""What one training step of an SAE costs, in time and in memory: ours beside the encoder's bare product and the peers.

    python benchmarks/train_step.py --threads 2 --memory --json step.json

Every contender takes whole steps, as its own trainer takes them: forward, backward, clipping and projections where it
has them, Adam, the decoder's normalisation, the counters of silent latents. Weights are fp32; `--dtype bf16` is
autocast. All see the same activations, another batch each round: a few strong directions and noise, so that latents
fire unevenly, as they do on a language model.

Time: everyone takes one step a round, in turn, so that a slow moment of the machine falls on all; medians are
reported. What costs time only at the beginning (initialisation, the optimizer's first step) is in the warm-up rounds
and dropped. No latent counts as dead to any contender in so few steps, so nobody pays for an auxiliary loss.

`--busy N` takes the steps again beside N processes that compute without end, with as many threads and with one, which
is what commands take where cores are busy. What a busy core costs is the ratio of either to the quiet steps.

Memory: a process of its own for each contender takes one step, so that parameters and optimizer state exist, and is
measured during the second. `step` is the peak less what was held before that step: gradients, pre-activations and all
else that a step needs for a while. `above state` is the peak less what the process held before the contender was
built, less parameters and optimizer state: the former, and what is kept between steps (counters, buffers, libraries
loaded late). On CUDA these are the allocator's own numbers. On the CPU they are resident memory, and `above state` is
good to some ten MB; the C library is told to give freed blocks back, so that no step fills an old one unseen.
"""

import argparse
import contextlib
import gc
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from contenders import CONTENDERS, Contender, Setting, activations
from torch import Tensor

MB = 1e6


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
    contenders: Sequence[tuple[Contender, Sequence[Tensor]]], warmup: int, *, may_fail: bool = False
) -> list[list[float]]:
    """Seconds of the steps of each contender on its batches: one a round and in turn, the first `warmup` dropped.

    With `may_fail`, one for which there is not enough memory is left out from then on and has no seconds.
    """
    taken: list[list[float]] = [[] for _ in contenders]
    running = list(range(len(contenders)))
    for number in range(len(contenders[0][1])):
        for index in list(running):
            contender, batches = contenders[index]
            try:
                taken[index].append(seconds(contender, batches[number], number))
            except (MemoryError, RuntimeError) as error:
                if not (may_fail and is_out_of_memory(error)):
                    raise
                taken[index].clear()
                running.remove(index)
    return [times[warmup:] for times in taken]


@contextlib.contextmanager
def busy_cores(count: int) -> Iterator[list[subprocess.Popen]]:
    """So many processes, which compute while this is open."""
    with contextlib.ExitStack() as stack:
        processes = []
        for _ in range(count):
            process = stack.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
            stack.callback(process.kill)
            processes.append(process)
        yield processes


def beside_others(
    contenders: dict[str, tuple[Contender, Sequence[Tensor]]], options: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Median seconds of a step beside `--busy` others, by how many threads there are and by name."""
    found = {}
    with busy_cores(options.busy):
        for threads in dict.fromkeys((options.threads, 1)):
            torch.set_num_threads(threads)
            times = interleaved(list(contenders.values()), options.warmup, may_fail=True)
            found[f"{threads} threads" if threads > 1 else "1 thread"] = {
                name: statistics.median(values) for name, values in zip(contenders, times, strict=True) if values
            }
    torch.set_num_threads(options.threads)
    return found


def is_out_of_memory(error: BaseException) -> bool:
    """For a GPU torch raises an error of its own, for the CPU it only says so."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


# Memory


def resident(field: str) -> int:
    """Bytes of this process's memory: VmRSS is what it holds, VmHWM its peak."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


class Meter:
    """Reads what is held, and the peak since `reset`."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"

    def held(self) -> int:
        gc.collect()
        return torch.cuda.memory_allocated() if self.cuda else resident("VmRSS")

    def reset(self) -> None:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated() if self.cuda else resident("VmHWM")


def memory(name: str, setting: Setting, threads: int) -> dict[str, float]:
    """MB of the peak of one step above what was held before and above parameters and optimizer state, and of these;
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
    return {"step": (peak - before) / MB, "above_state": (peak - empty - state) / MB, "state": state / MB}


def memory_of_each(names: Sequence[str], setting: Setting, threads: int) -> dict[str, dict[str, float]]:
    # Read by the C library of the processes started below: blocks of 1 MB and more go back when they are freed.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = os.environ["MALLOC_TRIM_THRESHOLD_"] = str(2**20)
    used = {}
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for name in names:
            try:
                used[name] = pool.apply(memory, (name, setting, threads))
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
    return used


def build_each(names: Sequence[str], setting: Setting, batch: Tensor) -> dict[str, Contender]:
    """Those contenders for which there is enough memory."""
    built = {}
    for name in names:
        try:
            built[name] = CONTENDERS[name].build(setting, batch)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
    return built


# Report


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_setting(parser)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1, help="rounds before those that count")
    parser.add_argument("--only", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--busy", type=int, default=0, metavar="N", help="measure beside N busy processes, too")
    parser.add_argument("--memory", action="store_true", help="measure each contender's memory, too")
    parser.add_argument("--json", help="write the numbers here, too")
    options = parser.parse_args()
    check_rounds(parser, options)
    if options.busy < 0:
        parser.error(f"--busy must be a number of processes, at least 0, got {options.busy}.")
    if options.memory and options.device == "cpu" and platform.system() != "Linux":
        parser.error("--memory on the CPU reads /proc, which only Linux has; leave it out or take --device cuda.")
    return options


def add_setting(parser: argparse.ArgumentParser) -> None:
    """The options that make a Setting."""
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--hidden-size", type=int, default=768)
    parser.add_argument("--num-latents", type=int, default=16384)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--levels", type=int, default=5)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())


def check_rounds(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.repeats < 1 or options.warmup < 1:
        parser.error(f"--repeats and --warmup must be at least 1, got {options.repeats} and {options.warmup}.")
    if options.device == "cuda" and not torch.cuda.is_available():
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
    if options.device == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU, {options.threads} threads"


def ratios(values: dict[str, float]) -> dict[str, float]:
    """Ours over the bare product and over the plain SAE, our transcoder and each peer over ours, of those that were
    measured, and (memory of tiny steps) not as zero.
    """
    pairs = [("ours", "gemm"), ("ours", "ours-plain"), ("ours-transcoder", "ours")]
    pairs += [(name, "ours") for name, entry in CONTENDERS.items() if entry.distribution]
    return {f"{a}/{b}": values[a] / values[b] for a, b in pairs if a in values and values.get(b)}


def table(result: dict[str, Any], levels: int) -> None:
    tokens = result["setting"]["batch_size"]
    print(f"{'':36}{'s/step':>9}{'from':>9}{'to':>9}{'tokens/s':>11}{'step MB':>10}{'above state MB':>16}")
    for name, median in result["seconds"].items():
        values, used = result["all_seconds"][name], result["memory"].get(name)
        label = CONTENDERS[name].label.format(levels=levels)
        print(f"{label:36}{median:9.4f}{min(values):9.4f}{max(values):9.4f}{tokens / median:11,.0f}", end="")
        print(f"{used['step']:10,.1f}{used['above_state']:16,.1f}" if used else "")
    for kind in ("time", "memory"):
        for pair, ratio in result["ratios"][kind].items():
            print(f"{kind:7} {pair:28}{ratio:8.2f}")
    for threads, seconds in result["busy"].items():
        for name, median in seconds.items():
            print(f"busy, {threads}: {name:20}{median:9.4f}{median / result['seconds'][name]:8.2f} x quiet")


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    setting = setting_of(options)
    peers = {name: entry for name, entry in CONTENDERS.items() if name in options.only and entry.distribution}
    versions = {name: entry.version() for name, entry in peers.items()}
    skipped = {
        name: f"{peers[name].distribution} is not installed" for name, version in versions.items() if version is None
    }
    without = [name for name in options.only if CONTENDERS[name].cuda and setting.device != "cuda"]
    skipped |= dict.fromkeys(without, "needs a GPU")
    names = [name for name in CONTENDERS if name in options.only and name not in skipped]
    for name, reason in skipped.items():
        print(f"skipped {name}: {reason}")
    if not names:
        raise SystemExit("Nothing is left to measure; install the peers with `pip install hf-msae[benchmarks]`.")
    used = memory_of_each(names, setting, options.threads) if options.memory else {}
    batches = activations(setting, options.warmup + options.repeats)
    built = build_each(names, setting, batches[0])
    times = interleaved([(contender, batches) for contender in built.values()], options.warmup, may_fail=True)
    taken = {name: found for name, found in zip(built, times, strict=True) if found}
    for name in names:
        if name not in taken:
            skipped[name] = "not enough memory"
            print(f"skipped {name}: {skipped[name]}")
    if not taken:
        raise SystemExit("There is not enough memory for any of them; take smaller sizes.")
    medians = {name: statistics.median(values) for name, values in taken.items()}
    left = {name: (contender, batches) for name, contender in built.items() if name in taken}
    busy = beside_others(left, options) if options.busy else {}
    result = {
        "where": where(options),
        "setting": asdict(setting),
        "versions": {"torch": torch.__version__} | {name: found for name, found in versions.items() if found},
        "skipped": skipped,
        "seconds": medians,
        "all_seconds": taken,
        "busy": busy,
        "memory": used,
        "ratios": {
            "time": ratios(medians),
            "memory": ratios({name: values["step"] for name, values in used.items()}),
        },
    }
    print(f"{result['where']}, {options.dtype}, {setting}, medians of {options.repeats}")
    table(result, setting.levels)
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
