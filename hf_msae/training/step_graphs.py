"""CUDA graphs of training steps: a GPU is told once what a step does, and from then on only to do it again.

A step asks for some two hundred kernels, and asking for one takes the CPU about as long as the GPU needs for the
smaller of them. So a small SAE's step (4,096 tokens, 16,384 latents of width 768) waits for the CPU, not for the GPU.
A graph holds all that was asked, with the addresses of the tensors; a replay is one launch.

What a graph holds must have the same shapes in every step, and nobody may read a number in between. Therefore latents
are selected and dead ones counted outside. What comes of that is copied to where the graph reads it, with all else
that changes from step to step; weights and Adam's averages change where they lie.
"""

import logging
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from hf_msae.errors import InputError
from hf_msae.modeling import MatryoshkaSAE
from hf_msae.modeling.objective import BatchContext
from hf_msae.modeling.sparse_encoder import ActiveLatents
from hf_msae.training.micro_batches import SAEBatch
from hf_msae.training.run import Run
from hf_msae.training.step_statistics import StepStatistics

logger = logging.getLogger(__name__)

# How many numbers of dead latents are told apart.
DEAD_LENGTHS = 16
# Graphs that are kept, and steps that are remembered as seen: for each of these before and after inner levels'
# gradients are held back, and some more.
MAX_GRAPHS = 40
# Tensors among a step's options that are others in every step.
OF_A_STEP = ("variance", "sparsity_weight")


def check_graphs(run: Run, saes: Mapping[str, MatryoshkaSAE]) -> None:
    """Refuse `cuda_graphs` where no step could be captured.

    Args:
        run: The run.
        saes: SAEs by name.

    Raises:
        InputError: On another device than a CUDA GPU, with several processes or micro-batches, and for SAEs whose
            steps have other shapes every time.
    """
    if not run.args.cuda_graphs:
        return
    reason = None
    if run.device.type != "cuda" or torch.version.hip is not None:
        reason = f"they are captured on NVIDIA's GPUs, and this run trains on {run.device.type}"
    elif run.num_processes > 1:
        reason = f"there are {run.num_processes} processes, whose sums no graph holds"
    elif run.args.gradient_accumulation_steps > 1:
        reason = f"a step has {run.args.gradient_accumulation_steps} micro-batches: take one that is as large"
    for name, sae in saes.items():
        if sae.config.activation not in ("batch_topk", "topk"):
            reason = f"{name} has activation={sae.config.activation!r}, of which another number is active every step"
        elif sae.config.prefix_sampling != "fixed":
            reason = f"{name} has prefix_sampling={sae.config.prefix_sampling!r}, which draws other levels every step"
    if reason is not None:
        raise InputError(f"cuda_graphs cannot be had here: {reason}. Or leave cuda_graphs out.")


class Compute(Protocol):
    """Computes a step: gradients of its micro-batches, and what the optimizer does with them."""

    def __call__(
        self,
        parts: Sequence[SAEBatch],
        contexts: Sequence[BatchContext],
        options: Mapping[str, Any],
        rates: Sequence[Tensor],
    ) -> StepStatistics:
        """As `Learner` computes it."""


class _Graph(NamedTuple):
    """A graph, the tensors that it reads, and what it leaves, whose tensors each replay writes anew."""

    graph: Any
    inputs: Mapping[str, Tensor]
    statistics: StepStatistics


class StepGraphs:
    """Graphs of one SAE's steps, by what tells steps of different shapes apart.

    A step is computed as always when its like is seen first: that compiles kernels, and makes what is kept. When it is
    seen again, it is captured. Where that fails, there is one warning, and steps are computed as always.

    Args:
        sae: The SAE.
        pool: Memory that graphs share, as `torch.cuda.graph_pool_handle` gives it. They are replayed one after the
            other, and none reads what another left.

    Attributes:
        captures: Whether steps are captured; no longer once that failed.
        replays: How many steps were replayed.
    """

    def __init__(self, sae: MatryoshkaSAE, pool: Any) -> None:
        self._sae, self._pool = sae, pool
        self.captures, self.replays = True, 0
        self._seen: deque[Hashable] = deque(maxlen=MAX_GRAPHS)
        self._graphs: dict[Hashable, _Graph] = {}

    def clear(self) -> None:
        """Forget all graphs, because tensors that they write are about to be others."""
        self._seen.clear()
        self._graphs.clear()

    def run(
        self,
        batch: SAEBatch,
        active: ActiveLatents,
        options: Mapping[str, Any],
        rates: Tensor,
        compute: Compute,
        kind: Hashable = None,
    ) -> StepStatistics:
        """Compute a step, or replay it.

        Args:
            batch: The batch, which is one micro-batch.
            active: What is active of it.
            options: Of the step, as `MatryoshkaSAE.forward` takes them.
            rates: The learning rate of each of the optimizer's groups, on the device.
            compute: Computes the step; it waits for nothing, and copies nothing from the CPU.
            kind: Whatever else tells what `compute` does from step to step.

        Returns:
            What `compute` gives; the next step may write it anew.
        """
        dead = self._filled_up(options["dead_latents"].nonzero().squeeze(-1))
        varying = {"x": batch.x, "target": batch.target, "token_ids": batch.token_ids, "rates": rates}
        varying |= {**active._asdict(), **{name: options[name] for name in OF_A_STEP}, "dead_latents": dead}
        inputs = {name: tensor for name, tensor in varying.items() if tensor is not None}

        def from_inputs(given: Mapping[str, Tensor]) -> StepStatistics:
            part = SAEBatch(given["x"], given.get("target"), given.get("token_ids"))
            context = BatchContext(ActiveLatents(*(given[name] for name in ActiveLatents._fields)))
            own = {name: given.get(name) for name in (*OF_A_STEP, "dead_latents")}
            return compute([part], [context], {**options, **own}, given["rates"].unbind())

        if dead is not None and not self._sae.revives_densely(len(dead)):
            return from_inputs(inputs)  # which counts them on the way
        shapes = tuple((name, tuple(tensor.shape)) for name, tensor in inputs.items())
        key = (kind, options["k"], options["inner_shares"], shapes)
        if key not in self._graphs:
            seen = key in self._seen
            self._seen.append(key)
            if not (seen and self.captures and self._capture(key, inputs, from_inputs)):
                return from_inputs(inputs)
        captured = self._graphs[key]
        for name, tensor in inputs.items():
            captured.inputs[name].copy_(tensor)
        captured.graph.replay()
        self.replays += 1
        return captured.statistics

    def _capture(
        self, key: Hashable, inputs: Mapping[str, Tensor], compute: Callable[[Mapping[str, Tensor]], StepStatistics]
    ) -> bool:
        """Capture a step, which does not compute it; whether that went well."""
        if len(self._graphs) == MAX_GRAPHS:
            del self._graphs[next(iter(self._graphs))]
        read = {name: tensor.clone() for name, tensor in inputs.items()}
        graph = torch.cuda.CUDAGraph()
        try:
            # What other threads ask of the GPU meanwhile is their own affair.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                statistics = compute(read)
        except Exception as error:  # whatever a driver or an operation does that cannot be captured
            self.captures = False
            for parameter in self._sae.parameters():
                parameter.grad = None
            reason = str(error).strip().splitlines() or [type(error).__name__]
            logger.warning(
                "A step could not be captured in a CUDA graph, so steps are computed as without --cuda-graphs. (%s)",
                reason[0][:300],
            )
            return False
        self._graphs[key] = _Graph(graph, read, statistics)
        return True

    def _filled_up(self, dead: Tensor) -> Tensor | None:
        """Numbers of dead latents (n,), filled up so that there are few different lengths; None where none is dead."""
        if not len(dead):
            return None
        num_latents = self._sae.config.num_latents
        step = -(-num_latents // DEAD_LENGTHS)
        return torch.nn.functional.pad(dead, (0, -len(dead) % step), value=num_latents)
