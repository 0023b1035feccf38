"""A dictionary too wide for one device: every process holds some of its latents.

The rows of encoder and decoder, and all that belongs to them, are cut into contiguous parts, one a process. What a
step does to its own latents is then what the whole model does to all of them, and only four things need the others:
the selection (all processes find the same border by counting, see `selection`), the sums over a group of latents, from
which every process computes the same errors, the sums over all latents in penalties and norms, and the decoder bias,
which all hold. Whether a run is cut into parts can be seen neither in its numbers nor in its files.

Every process sees all activations of a step. Per step and process, with N tokens, d = hidden_size and G levels, N·d
numbers are brought together and N·G·d summed, while processes that share the batch sum 2·num_latents·d: parts pay
where num_latents exceeds N·(G + 1) / 2, or where nothing else fits.

The first process writes the rows of all as they arrive, so none ever holds the whole; and the files are the same
whatever the number of processes, so a run goes on with another. (safetensors' own `save_file` wants all of a file in
memory. The format is a length, a header in JSON, and the numbers.)
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from hf_msae.errors import InputError
from hf_msae.modeling import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.modeling.dense_ops import decode_levels
from hf_msae.modeling.prefix_loading import WEIGHTS_NAME
from hf_msae.modeling.ranged_files import format_header
from hf_msae.modeling.selection import SINGLE_PROCESS, ProcessGroup, among_largest
from hf_msae.modeling.sparse_encoder import ActiveLatents
from hf_msae.modeling.untrusted import PER_LATENT, SHARED_TENSORS
from hf_msae.training.collectives import row_pieces

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
}


class ShardedSAE(MatryoshkaSAE):
    """The latents `first_latent` to `last_latent` of an SAE, in training with those of the other processes.

    Latent activations, masks and rows are this process's own; losses, errors and reconstructions those of the whole.
    Every method that gives such must be called by all processes at the same time, with the same activations.

    Args:
        config: Of the whole.
        ranks: The processes that hold the parts.
        device: Where this part lies.

    Attributes:
        first_latent: The first latent of this process.
        last_latent: The one after its last.

    Raises:
        InputError: Where there are more processes than latents.
    """

    def __init__(self, config: MatryoshkaSAEConfig, ranks: ProcessGroup, device: torch.device) -> None:
        if config.num_latents < ranks.size:
            raise InputError(
                f"shard_latents gives each process some latents, but there are {ranks.size} processes and "
                f"num_latents={config.num_latents}. Use fewer processes, or leave shard_latents out."
            )
        with torch.device("meta"):
            super().__init__(config)
        self.ranks = ranks
        self._starts = [rank * config.num_latents // ranks.size for rank in range(ranks.size + 1)]
        self.first_latent, self.last_latent = self._starts[ranks.rank : ranks.rank + 2]
        for name, tensor in [*self.named_parameters(), *self.named_buffers()]:
            shape = [self.last_latent - self.first_latent, *tensor.shape[1:]] if name in PER_LATENT else tensor.shape
            empty = torch.zeros(shape, dtype=torch.float32, device=device)
            setattr(self, name, nn.Parameter(empty) if isinstance(tensor, nn.Parameter) else nn.Buffer(empty))
        self._bias_here: Tensor | None = None

    @property
    def rows(self) -> slice:
        """This process's latents among all."""
        return slice(self.first_latent, self.last_latent)

    def take_rows(self, whole: MatryoshkaSAE) -> None:
        """Take these latents' weights from an SAE that has them all.

        Args:
            whole: The SAE.
        """
        self.load_state_dict(
            {name: tensor[self.rows] if name in PER_LATENT else tensor for name, tensor in whole.state_dict().items()}
        )

    def gather_rows(self, rows: Tensor) -> Tensor:
        """Bring together what each process has for its latents.

        Args:
            rows: Something for each latent of this process, (n, ...).

        Returns:
            The same for each latent, (num_latents, ...).
        """
        sizes = [last - first for first, last in pairwise(self._starts)]
        padded = rows.new_zeros(max(sizes), *rows.shape[1:])
        padded[: rows.shape[0]] = rows
        gathered = self.ranks.gather(padded)
        return torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)])

    # Training

    def _subtracted_bias(self) -> Tensor | None:
        """The decoder bias as the encoder's input sees it.

        In each process that is a leaf of its own, whose gradient is that of its own latents.
        """
        bias = super()._subtracted_bias()
        if bias is None or not torch.is_grad_enabled():
            return bias
        if self._bias_here is None:
            self._bias_here = bias.detach().requires_grad_()
        return self._bias_here

    @torch.no_grad()
    def collect_bias_gradient(self) -> None:
        """After backward: add to b_dec's gradient what the encoders of all processes ask for."""
        if self._bias_here is not None and self.b_dec.grad is not None and self._bias_here.grad is not None:
            self.b_dec.grad += self.ranks.sum(self._bias_here.grad)
        self._bias_here = None

    def _select(
        self, x: Tensor, k: float, variance: Tensor | float, ranks: ProcessGroup = SINGLE_PROCESS
    ) -> ActiveLatents | None:
        """As in the whole, of these latents; the processes must agree on the path that they take."""
        active = super()._select(x, k, variance)
        if self.config.activation in ("batch_topk", "topk"):
            return active
        return None if self.ranks.total(int(active is None)) else active

    # Measuring

    @torch.no_grad()
    def encode(self, hidden_states: Tensor, prefix: int | None = None) -> Tensor:
        """Encode with this process's latents, in evaluation mode.

        Args:
            hidden_states: Activations of all processes, (..., hidden_size).
            prefix: Must be None.

        Returns:
            Latent activations, (..., last_latent - first_latent).

        Raises:
            ValueError: In training mode, or with a prefix.
        """
        if self.training or prefix is not None:
            raise InputError("A ShardedSAE encodes in evaluation mode and all of its latents: call eval(), no prefix.")
        if self.config.inference == "threshold":
            return super().encode(hidden_states)
        pre = self.pre_activations(hidden_states)
        flat = pre.reshape(-1, pre.shape[-1])
        return torch.relu(flat * among_largest(flat, round(self.config.k), self.ranks)).view_as(pre)

    @torch.no_grad()
    def decode_levels(
        self, latents: Tensor, hidden_states: Tensor | None = None, token_ids: Tensor | None = None
    ) -> Tensor:
        """Reconstruct by every prefix, from these latents and those of the other processes.

        Args:
            latents: This process's latent activations, (..., last_latent - first_latent).
            hidden_states: What was encoded, (..., hidden_size), where there is a skip.
            token_ids: The token of each activation, (...,), of a tokenized SAE.

        Returns:
            Reconstructions, (num_levels, ..., output_size).
        """
        width = self.last_latent - self.first_latent
        flat = latents.reshape(-1, width)
        sizes = [min(max(size - self.first_latent, 0), width) for size in self.config.prefix_sizes]
        base = self._decoder_base(hidden_states, token_ids, flat.shape[0])
        levels = list(decode_levels(flat, self.W_dec, base, sizes, ranks=self.ranks))
        return torch.stack(levels).view(len(levels), *latents.shape[:-1], self.config.output_size)

    # Files

    def write(self, folder: Path | None) -> None:
        """Write what `save_pretrained` of the whole would; all processes call this at the same time.

        Args:
            folder: Where to; None on all processes but the first.
        """
        if folder is not None:
            with torch.device("meta"):
                whole = MatryoshkaSAE(self.config)
            # The configuration and the code; the weights follow.
            whole.save_pretrained(folder, state_dict={"b_dec": self.b_dec.detach().cpu()})
        rows = {name: tensor for name, tensor in self.state_dict().items() if name in PER_LATENT}
        path = None if folder is None else folder / WEIGHTS_NAME
        shared = {name: tensor for name, tensor in self.state_dict().items() if name not in PER_LATENT}
        write_latent_file(path, rows, shared, self.config.num_latents, self.ranks)

    def read(self, folder: Path) -> None:
        """Take these latents' rows from a folder.

        Args:
            folder: One that `write` or `save_pretrained` made.
        """
        state = read_latent_file(folder / WEIGHTS_NAME, self.first_latent, self.last_latent, self.config.num_latents)
        self.load_state_dict(state)

    def save_pretrained(self, save_directory: Any, *arguments: Any, **options: Any) -> None:  # type: ignore[override]
        """Refused: the files of the whole need all processes."""
        raise RuntimeError("A ShardedSAE is written by all processes together: call write().")


# Files whose tensors have a row for each latent


def write_latent_file(
    path: Path | None, rows: Mapping[str, Tensor], shared: Mapping[str, Tensor], num_latents: int, ranks: ProcessGroup
) -> None:
    """Write a safetensors file; every process calls this at the same time, the first with a path.

    Args:
        path: The file; None sends this process's rows only.
        rows: This process's rows of tensors (num_latents, ...).
        shared: Tensors that every process has; those of the first are written.
        num_latents: Rows of all processes together.
        ranks: The processes, which hold the rows in their order.

    Raises:
        OSError: The first one of writing, once all that the other processes send was taken.
    """
    failure: OSError | None = None
    with _opened(path) as file:
        if file is not None:
            shapes = {name: (tensor, [num_latents, *tensor.shape[1:]]) for name, tensor in rows.items()}
            shapes |= {name: (tensor, list(tensor.shape)) for name, tensor in shared.items()}
            file.write(format_header((name, DTYPES[tensor.dtype], shape) for name, (tensor, shape) in shapes.items()))
        for tensor in rows.values():
            for piece in row_pieces(tensor.detach(), ranks):
                failure = failure or _write(file, piece)
        for tensor in shared.values():
            failure = failure or _write(file, tensor.detach())
    if failure is not None:
        raise failure


@contextmanager
def _opened(path: Path | None) -> Iterator[IO[bytes] | None]:
    if path is None:
        yield None
    else:
        with path.open("wb") as file:
            yield file


def _write(file: IO[bytes] | None, tensor: Tensor) -> OSError | None:
    """Write a tensor's numbers; the error, if that fails, because others are still sending."""
    if file is None:
        return None
    try:
        file.write(tensor.contiguous().cpu().view(-1).view(torch.uint8).numpy().data)
    except OSError as error:
        return error
    return None


def read_latent_file(path: Path, first: int, stop: int, num_latents: int) -> dict[str, Tensor]:
    """Read some latents' rows of a safetensors file.

    Args:
        path: The file.
        first: The first latent.
        stop: The one after the last.
        num_latents: Rows of the tensors that have one for each latent.

    Returns:
        Tensors by name: these rows of those with a row for each latent, all of others.
    """
    tensors = {}
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            part = file.get_slice(name)
            # These have no row for each latent, but may be as long as there are latents.
            has_rows = name not in SHARED_TENSORS and part.get_shape()[:1] == [num_latents]
            # A copy, because a part of a mapped file begins anywhere, on which the last bits of products depend.
            tensors[name] = (part[first:stop] if has_rows else part[:]).clone()
    return tensors
