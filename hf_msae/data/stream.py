"""Activations on the fly: windows go through the language model in blocks, and come out as shuffled batches.

Neighbouring tokens have similar activations, so batches must mix many documents. The stream harvests a block of
windows, draws a permutation of the block's tokens, hands out batches along it, and harvests the next block.
`block_tokens` is the knob: a batch mixes about block_tokens / context_length windows, and a block takes block_tokens *
hidden_size elements of memory per site (262,144 tokens of a 2,304-wide model in bfloat16: 1.2 GB). The permuted block
is never materialised; a batch gathers its own rows.

The permutation depends on (seed, shard, block number) alone, and a batch on nothing but the block and the place in it.
So the state of a stream is small (where the block began in the text, and how much of it was handed out), and a resumed
run repeats at most one block of forward passes before it continues bit for bit.

On CUDA the next block is harvested while this one is used: between two batches a few forward passes are launched on a
CUDA stream of their own, so that the device always has work and never waits for the next block. (No thread: hooks on
the model would otherwise meet whatever else runs it.) That takes the memory of two blocks, and changes no batch. A
model that several processes run together has sums of its own, which on a stream of their own would meet those of the
training in another order on each device, and might wait for each other for ever; so it shares the training's stream.
"""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_msae.data.forward import TOKEN_IDS, activation_sites, capture_counted, check_eval, groups
from hf_msae.data.randomness import seeded_generator
from hf_msae.data.sources import DatasetError
from hf_msae.data.states import check_state
from hf_msae.data.windows import TokenWindows, Window
from hf_msae.errors import InputError
from hf_msae.modeling.devices import sent
from hf_msae.outliers import ActivationError, activation_norms
from hf_msae.sites import Site, resolve_site


class BatchIterator(ABC, Iterator[dict[Site, Tensor]]):
    """Batches of exactly `batch_size` rows, cut across blocks of activations that a subclass provides.

    The state is taken when a batch is complete, so that whatever interrupts the making of the next one (an error,
    Ctrl-C) leaves the state of the batch before it.

    Attributes:
        part: which rows of each batch are read and given; all, unless processes share a batch and each takes its own.
        on_read: called while a block is made that the next batch waits for, with how many tokens of about how many the
            language model has read.
        num_tokens: rows handed out so far, those before a resume and in others' parts included.
        num_dropped: rows at the end of the data that did not fill a batch.
        num_filtered: tokens left out as outliers.
    """

    def __init__(self, batch_size: int) -> None:
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {batch_size}")
        self.batch_size = batch_size
        self.part = range(batch_size)
        self.on_read: Callable[[int, int], None] = lambda done, total: None
        self.num_tokens = 0
        self.num_dropped = 0
        self.num_filtered = 0
        self._block: dict[Site, Tensor] = {}
        self._order = torch.empty(0, dtype=torch.int64)
        self._position = 0
        self._state: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        """The place after the latest batch; JSON can hold it."""
        return copy.deepcopy(self._state)

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues after the batch after which `state` was taken."""

    @abstractmethod
    def _advance(self) -> bool:
        """Puts the next block into `_block` and the order of its rows into `_order`; False at the end of the data."""

    @abstractmethod
    def _place(self) -> dict[str, Any]:
        """What `load_state_dict` needs to come back to this point."""

    def __next__(self) -> dict[Site, Tensor]:
        parts: list[dict[Site, Tensor]] = []
        missing = self.batch_size
        while missing:
            rows = self._order[self._position : self._position + missing]
            if len(rows):
                given = self.batch_size - missing
                own = rows[max(0, self.part.start - given) : max(0, self.part.stop - given)]
                if len(own):
                    parts.append({site: block[sent(own, block.device)] for site, block in self._block.items()})
                self._position += len(rows)
                missing -= len(rows)
            elif not self._next_block():
                self._end(dropped=self.batch_size - missing)
        self.num_tokens += self.batch_size
        self._state = self._place()
        if len(parts) == 1:
            return parts[0]
        return {site: torch.cat([part[site] for part in parts]) for site in parts[0]}

    def _restore(self, state: Mapping[str, Any]) -> None:
        """Come to the place of `state` once a subclass is set to read that block next."""
        check_state(state, "num_tokens", "num_dropped", "position")
        self.num_tokens, self.num_dropped = state["num_tokens"], state["num_dropped"]
        self._order = self._order[:0]
        self._position = 0
        if state["position"]:
            self._advance()
            self._position = state["position"]
        self._state = copy.deepcopy(dict(state))

    def _next_block(self) -> bool:
        self._position = 0
        self._order = self._order[:0]
        return self._advance()

    def _end(self, dropped: int) -> NoReturn:
        self.num_dropped += dropped
        if self.num_tokens == 0:
            raise DatasetError(
                f"the data ends after {dropped:,} activations, fewer than one batch of {self.batch_size:,}; "
                "use more data or a smaller batch"
            )
        raise StopIteration


@dataclass
class _Block:
    """Windows on their way through the model: which, how far, and what came out."""

    number: int
    begins: dict[str, Any]
    ends: dict[str, Any]
    passes: list[list[Window]]
    done: int = 0
    rows: int = 0
    buffers: dict[Site, Tensor] = field(default_factory=dict)
    norms: dict[Site, list[Tensor]] = field(default_factory=dict)
    num_filtered: int = 0


class ActivationStream(BatchIterator):
    """Shuffled batches of a language model's activations, made while they are used.

    Args:
        model: the language model, in eval mode; with or without its head, on any device or split over several.
        sites: sites, or their names; `TOKEN_IDS` among them asks for the tokens, too.
        windows: the token windows of this process.
        batch_size: rows per batch.
        block_tokens: tokens that count in a block; more mixes better and takes more memory (see the module).
        lm_batch_size: windows per forward pass.
        seed: with `shard` and the block number it fixes the permutation.
        shard: give each process its rank.
        norm_limits: the largest norm of an activation that counts, by site, as `find_norm_limits` finds it; a token
            beyond it at any site is dropped at all of them. None and 0 keep all.
        pad_id: the token that fills short windows; never attended to.
        ahead: whether to harvest a block while the one before it is used; None where the model is on CUDA.

    Yields:
        `{site: (batch_size, hidden_size)}`, in the dtype and on the device on which the model gives them. Row i is the
        same token at every site. `TOKEN_IDS`, where asked for, are (batch_size,) int64.

    Attributes:
        num_tokens, num_dropped: as in `BatchIterator`.
        num_filtered: as there, in all blocks begun so far.

    Raises:
        ValueError: the model is in training mode, or a number is out of range.
        ActivationError: activations are NaN or infinite.
        DatasetError: the data does not fill one batch.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sites: Sequence[Site | str],
        windows: TokenWindows,
        *,
        batch_size: int,
        block_tokens: int = 2**18,
        lm_batch_size: int = 16,
        seed: int = 0,
        shard: int = 0,
        norm_limits: Mapping[Site, float | None] | None = None,
        pad_id: int = 0,
        ahead: bool | None = None,
    ) -> None:
        super().__init__(batch_size)
        places = activation_sites(sites)
        if not places:
            raise InputError("sites is empty: name at least one site, such as 'layers.4'")
        if block_tokens < 1 or lm_batch_size < 1:
            raise InputError(f"block_tokens ({block_tokens}) and lm_batch_size ({lm_batch_size}) must be at least 1")
        check_eval(model)
        self.model = model
        tokens = [TOKEN_IDS] if TOKEN_IDS in sites else []
        self.sites = list(dict.fromkeys([*(resolve_site(model, site) for site in places), *tokens]))
        self.windows = windows
        self.block_tokens = block_tokens
        self.lm_batch_size = lm_batch_size
        self.seed = seed
        self.shard = shard
        self.norm_limits = {site: limit for site, limit in (norm_limits or {}).items() if limit}
        self.pad_id = pad_id
        self.ahead = model.device.type == "cuda" if ahead is None else ahead
        apart = model.device.type == "cuda" and self.ahead and (model.tp_size or 1) == 1
        self._side = torch.cuda.Stream(model.device) if apart else None
        # Buffers of blocks that are used up, to be filled again.
        self._buffers: list[dict[Site, Tensor]] = []
        self._reader: Iterator[Window] | None = None
        self._current: _Block | None = None
        self._next: _Block | None = None
        self._next_number = 0
        self._state = self._place()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues after the batch after which `state` was taken; harvests that batch's block again.

        Raises `ValueError` where the state is of a stream that orders its tokens differently.
        """
        check_state(state, "block", "num_filtered")
        if state.get("settings") != self.settings:
            raise InputError(
                f"the state was taken of a stream with {state.get('settings')}, this one has {self.settings}"
            )
        self.windows.load_state_dict(check_state(state.get("windows")))
        self._reader = self._current = self._next = None
        self._next_number = state["block"]
        self.num_filtered = state["num_filtered"]
        self._restore(state)

    def draw_windows(self, num_tokens: int) -> list[Window]:
        """Windows of the block that the latest batch comes from, drawn anew for each batch as a function of its place.

        num_tokens: how many tokens that count they hold together, at least; all of the block's where it has fewer.
        """
        block = self._current
        if block is None:
            raise RuntimeError("draw_windows comes after a batch, of whose block it draws.")
        windows = [window for passed in block.passes for window in passed]
        generator = seeded_generator(self.seed, self.shard, block.number, self._position)
        drawn: list[Window] = []
        for index in torch.randperm(len(windows), generator=generator).tolist():
            if num_tokens <= 0:
                break
            drawn.append(windows[index])
            num_tokens -= int(windows[index].keep.sum())
        return drawn

    @property
    def settings(self) -> dict[str, Any]:
        """What decides which token comes when."""
        return {
            "sites": [str(site) for site in self.sites],
            "block_tokens": self.block_tokens,
            "seed": self.seed,
            "shard": self.shard,
            "norm_limits": {str(site): limit for site, limit in self.norm_limits.items()},
        }

    def _place(self) -> dict[str, Any]:
        place = {"num_tokens": self.num_tokens, "num_dropped": self.num_dropped, "settings": self.settings}
        block = self._current
        if block is None:
            return (
                place
                | {"windows": self.windows.state_dict(), "block": self._next_number, "position": 0}
                | {"num_filtered": self.num_filtered}
            )
        if self._position == len(self._order):
            # The block is used up: the next one begins where its windows end, and need not be harvested to know that.
            after = {"windows": block.ends, "block": block.number + 1, "position": 0}
            return place | after | {"num_filtered": self.num_filtered}
        inside = {"windows": block.begins, "block": block.number, "position": self._position}
        return place | inside | {"num_filtered": self.num_filtered - block.num_filtered}

    def __next__(self) -> dict[Site, Tensor]:
        if self.ahead:
            self._harvest_ahead()  # first, so that an error in it does not lose a batch
        return super().__next__()

    def _advance(self) -> bool:
        block = self._next or self._begin_block()
        self._next = None
        if block is None:
            return False
        for passes in range(block.done + 1, len(block.passes) + 1):
            self._harvest(block, passes)
            self.on_read(min(block.rows, self.block_tokens), self.block_tokens)
        if self._current is not None:
            self._buffers.append(self._current.buffers)
        self._current = block
        inlying = self._inliers(block)
        kept = inlying.nonzero().flatten()
        block.num_filtered = len(inlying) - len(kept)
        self.num_filtered += block.num_filtered
        order = kept[torch.randperm(len(kept), generator=seeded_generator(self.seed, self.shard, block.number))]
        self._block = {site: buffer[: block.rows] for site, buffer in block.buffers.items()}
        self._order = order if self._side is None else order.pin_memory()
        return True

    def _harvest_ahead(self) -> None:
        """Bring the next block as far as this one is used up."""
        if self._current is None:
            return
        if self._next is None:
            self._next = self._begin_block()
        if self._next is not None:
            used = self._position / max(1, len(self._order))
            self._harvest(self._next, passes=math.ceil(used * len(self._next.passes)))

    def _begin_block(self) -> "_Block | None":
        """Read the windows of a block, none of which went through the model yet; None at the end of the data."""
        if self._reader is None:
            self._reader = iter(self.windows)
        begins = self.windows.state_dict()
        windows = self._take_windows(self._reader)
        if not windows:
            return None
        passes = list(groups(windows, self.lm_batch_size))
        block = _Block(self._next_number, begins, self.windows.state_dict(), passes)
        self._next_number += 1
        if self._buffers:
            block.buffers = self._buffers.pop()
        if self._side is not None:
            # What is still queued may read the buffers that are about to be filled again.
            self._side.wait_stream(torch.cuda.current_stream(self.model.device))
        return block

    def _take_windows(self, reader: Iterator[Window]) -> list[Window]:
        """Windows with about `block_tokens` tokens that count, long ones first so that passes have little padding."""
        windows: list[Window] = []
        tokens = 0
        while tokens < self.block_tokens and (window := next(reader, None)) is not None:
            windows.append(window)
            tokens += int(window.keep.sum())
        return sorted(windows, key=lambda window: -len(window.input_ids))

    def _harvest(self, block: "_Block", passes: int) -> None:
        """Fill a block's buffers by forward passes, until so many of its passes are done."""
        if self._side is None:
            self._fill(block, passes)
            return
        with torch.cuda.stream(self._side):
            self._fill(block, passes)
        if block.done == len(block.passes):
            torch.cuda.current_stream(self.model.device).wait_stream(self._side)

    def _fill(self, block: "_Block", passes: int) -> None:
        while block.done < passes:
            windows = block.passes[block.done]
            captured = capture_counted(self.model, self.sites, windows, self.pad_id)
            block.done += 1
            if captured is None:
                continue
            before, block.rows = block.rows, block.rows + len(captured[self.sites[0]])
            for site, activations in captured.items():
                if site not in block.buffers:
                    # A block ends with the window that completes it, so it is at most one window longer than asked.
                    size = (self.block_tokens + self.windows.context_length, *activations.shape[1:])
                    block.buffers[site] = activations.new_empty(size)
                block.buffers[site][before : block.rows] = activations
                if site == TOKEN_IDS:
                    continue
                # Pass by pass, because on the CPU this makes a float32 copy.
                block.norms.setdefault(site, []).append(activation_norms(activations))

    def _inliers(self, block: "_Block") -> Tensor:
        """Bool (tokens,) on the CPU: tokens that no site finds outlying."""
        inlying = torch.ones(block.rows, dtype=torch.bool)
        for site, parts in block.norms.items():
            norms = torch.cat(parts)
            self._check_finite(site, norms, block)
            if site in self.norm_limits:
                inlying &= (norms <= self.norm_limits[site]).cpu()
        return inlying

    def _check_finite(self, site: Site, norms: Tensor, block: "_Block") -> None:
        bad = int((~norms.isfinite()).sum())
        if bad:
            raise ActivationError(
                f"{bad:,} of {len(norms):,} activations at {site} in block {block.number} are NaN or infinite "
                f"(model {self.model.name_or_path!r}, {block.buffers[site].dtype}). A float16 model often overflows: "
                "load it in bfloat16 or float32. Else check its weights, and the documents that end at window "
                f"{self.windows.num_windows} of {self.windows.documents.description}."
            )
