"""What the processes of a run say to each other in a step: messages and bytes, against batch and dictionary.

    python benchmarks/communication.py --processes 1 2 4 --json communication.json

Every setting is a real run of so many processes over gloo on this machine: `Learner.step` on activations with a few
strong directions, `--steps` times after one that is not counted. Messages and bytes are counted where they are sent
(`hf_msae.training.collectives`): the size of the tensors that one process gives to the operation. What a network
carries for it depends on the algorithm: in a ring of R processes a sum sends and receives 2·(R − 1)/R times its size,
and a gathering (R − 1) times.

    python benchmarks/communication.py --estimate

prints instead what a dictionary of 1,048,576 latents of width 4,096 would need and take with its latents sharded over
8 and 64 GPUs: what is held and what travels is counted from shapes, as above; times follow from the hardware numbers
in `GPU`, which are the manufacturer's, times the shares of them that are usual in practice. It is paper, not a
measurement.

Bytes are the same on any machine. Seconds are those of as many processes as there are, on the cores that there are:
with more processes than cores they say nothing about a machine that has a device for each.
"""

import argparse
import json
import os
import socket
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as processes
from hf_msae.modeling import MatryoshkaSAE, MatryoshkaSAEConfig
from torch import Tensor

from hf_msae.sites import Site
from hf_msae.training import SAETrainingArguments
from hf_msae.training.collectives import TorchProcessGroup
from hf_msae.training.learner import Learner
from hf_msae.training.run import Run
from hf_msae.training.sharded import ShardedSAE


@dataclass(frozen=True)
class Setting:
    """`batch_size` is that of all processes together."""

    processes: int
    sharded: bool
    batch_size: int
    hidden_size: int
    num_latents: int
    k: int
    steps: int


def activations(setting: Setting, seed: int) -> Tensor:
    """This process's part of a batch."""
    generator = torch.Generator().manual_seed(seed)
    rank = setting.hidden_size // 8
    directions = torch.randn(rank, setting.hidden_size, generator=torch.Generator().manual_seed(0))
    rows = setting.batch_size // setting.processes
    strengths = torch.randn(rows, rank, generator=generator) * torch.arange(1, rank + 1).pow(-0.5)
    return strengths @ directions + 0.5 * torch.randn(rows, setting.hidden_size, generator=generator)


def make_run(setting: Setting) -> Run:
    return Run(
        SAETrainingArguments(
            per_device_train_batch_size=setting.batch_size // setting.processes,
            max_steps=1000,
            use_cpu=True,
            shard_latents=setting.sharded,
            dead_after_tokens=10_000_000,
        )
    )


def make_learner(setting: Setting, run: Run) -> Learner:
    config = MatryoshkaSAEConfig(hidden_size=setting.hidden_size, num_latents=setting.num_latents, k=setting.k)
    part = setting.sharded and setting.processes > 1
    sae = ShardedSAE(config, run.processes, run.device) if part else MatryoshkaSAE(config)
    return Learner("sae", sae, Site("layers.0"), run, 1000)


def one_process(rank: int, setting: Setting, port: int, out: str) -> None:
    """Take the steps; the first process writes what it counted."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(setting.processes)}
    # accelerate gives every process all cores unless told otherwise.
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    run = make_run(setting)
    learner = make_learner(setting, run)
    learner.start(activations(setting, rank))
    learner.step(activations(setting, rank), 0)
    # A process by itself sends nothing.
    sent = run.processes if isinstance(run.processes, TorchProcessGroup) else None
    if sent is not None:
        sent.calls.clear()
        sent.bytes.clear()
    began = time.perf_counter()
    for step in range(1, setting.steps + 1):
        learner.step(activations(setting, step * setting.processes + rank), step)
    seconds = (time.perf_counter() - began) / setting.steps
    if rank == 0:
        calls, sizes = (
            {name: counted[name] / setting.steps for name in ("reduce", "gather")}
            for counted in ((sent.calls, sent.bytes) if sent is not None else (Counter(), Counter()))
        )
        Path(out).write_text(
            json.dumps({**asdict(setting), "seconds": seconds, "calls": calls, "bytes": sizes}), encoding="utf-8"
        )


def measure(setting: Setting, out: Path) -> dict[str, Any]:
    """Run a setting by processes of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes.spawn(one_process, (setting, port, str(out)), nprocs=setting.processes)
    result = json.loads(out.read_text(encoding="utf-8"))
    out.unlink()
    return result


def row(result: dict[str, Any]) -> str:
    mode = "latents sharded" if result["sharded"] else "batch shared"
    calls, sizes = result["calls"], result["bytes"]
    return (
        f"| {result['processes']} | {mode} | {result['batch_size']:,} | {result['num_latents']:,} "
        f"| {calls['reduce']:.0f} + {calls['gather']:.0f} | {sizes['reduce'] / 1e6:.2f} | {sizes['gather'] / 1e6:.2f} "
        f"| {result['seconds']:.3f} |"
    )


def settings_of(options: argparse.Namespace) -> Sequence[Setting]:
    return [
        Setting(count, sharded, batch, options.hidden_size, latents, options.k, options.steps)
        for batch in options.batch_sizes
        for latents in options.num_latents
        for count in options.processes
        for sharded in ((False, True) if count > 1 else (False,))
    ]


@dataclass(frozen=True)
class GPU:
    """An H100 SXM in a node of eight, 400 Gb/s a GPU between nodes: peaks, and the share of each that is reached."""

    flops: float = 989e12 * 0.6  # dense bfloat16
    memory: float = 3.35e12 * 0.6
    # All-reduce in a ring, as nccl-tests counts its bus bandwidth; in a node by NVLink, between nodes by all adapters.
    in_node: float = 450e9 * 0.75
    between_nodes: float = 400e9 * 0.7


def estimate(ranks: int, tokens: int, num_latents: int, hidden_size: int, k: int, levels: int = 5) -> dict[str, float]:
    """GB of each GPU, and seconds of a step on `tokens` tokens of all processes together."""
    gpu, weights = GPU(), 2 * num_latents * hidden_size / ranks
    batch, sums, active = tokens * hidden_size, tokens * levels * hidden_size, tokens * k / ranks
    network = gpu.in_node if ranks <= 8 else gpu.between_nodes
    return {
        "weights": 4 * weights / 1e9,
        "Adam": 8 * weights / 1e9,
        "gradients": 4 * weights / 1e9,
        "half-precision encoder": weights / 1e9,
        # One tile of pre-activations and the mask of those above the threshold, `sparse_encoder.GPU_TILE`.
        "pre-activations": 3 * min(1 << 29, tokens * num_latents / ranks) / 1e9,
        # As they came, gathered, in float32, less the bias, in half precision.
        "activations": (2 + 2 + 4 + 4 + 2) * batch / 1e9,
        # The errors of every level, and their gradients.
        "levels": 8 * sums / 1e9,
        "encoder's product": 2 * batch * num_latents / ranks / gpu.flops,
        # Decode, its gradient for the values, and the gradients of both matrices read a row for each active latent.
        "active latents": 4 * active * hidden_size * 4 / gpu.memory,
        # Norms and projection read gradients and decoder; Adam reads four tensors and writes three.
        "optimizer": (7 + 1.5) * 4 * weights / gpu.memory,
        # About ten passes over (tokens, levels, hidden_size), which every process makes for itself.
        "errors of levels": 10 * 4 * sums / gpu.memory,
        "gather activations": 2 * batch * (ranks - 1) / ranks / network,
        "sum levels": 2 * (ranks - 1) / ranks * 4 * sums / network,
    }


def print_estimate() -> None:
    cases = {"8 GPUs": (8, 32_768), "64 GPUs": (64, 32_768), "64 GPUs, larger batch": (64, 131_072)}
    results = {name: estimate(*case, 1 << 20, 4096, 64) for name, case in cases.items()}
    print("| | " + " | ".join(f"{name}, {cases[name][1]:,} tokens" for name in cases) + " |")
    print("|---|" + "---|" * len(cases))
    keys = list(next(iter(results.values())))
    held, taken = keys[:7], keys[7:]
    for names, unit, scale in ((held, "GB", 1.0), (taken, "ms", 1e3)):
        for key in names:
            print(f"| {key}, {unit} | " + " | ".join(f"{scale * r[key]:.1f}" for r in results.values()) + " |")
        sums = (scale * sum(r[key] for key in names) for r in results.values())
        print(f"| **together, {unit}** | " + " | ".join(f"**{total:.1f}**" for total in sums) + " |")
    speeds = (cases[name][1] / sum(r[key] for key in taken) for name, r in results.items())
    print("| tokens/s, without the language model | " + " | ".join(f"{speed:,.0f}" for speed in speeds) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--num-latents", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--json")
    parser.add_argument("--estimate", action="store_true", help="print the estimate for GPUs instead")
    options = parser.parse_args()
    if options.estimate:
        print_estimate()
        return
    print("| processes | mode | batch | latents | sums + gatherings | MB summed | MB gathered | s/step |")
    print("|---|---|---|---|---|---|---|---|")
    results = []
    for setting in settings_of(options):
        results.append(measure(setting, Path(f".communication-{os.getpid()}.json")))
        print(row(results[-1]), flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
