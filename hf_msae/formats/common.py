"""What every format shares: where a checkpoint's files are, and what is read from them.

A format's reader sees a `Files`, so that a folder and a repo of the Hub are one thing to it, and gives a
`ConvertedCheckpoint`: the values of a configuration, tensors in our orientation, and what a user should know about the
conversion.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, dtype, promote_types

from hf_msae.errors import InputError
from hf_msae.formats.known_releases import release_of
from hf_msae.modeling import MatryoshkaSAE
from hf_msae.modeling.untrusted import inside, parse_json

# How many folders an error names where a user must choose one.
NAMED_FOLDERS = 100
DIGITS = re.compile(r"(\d+)")
# What the weights of an SAE of ours are called.
OWN_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
# What wrappers put before the names of a module's tensors: DataParallel and its kin, and torch.compile.
WRAPPERS = ("module.", "_orig_mod.")
# The published default of most libraries; of an SAE with a learnt or no threshold, k is only the target of training.
DEFAULT_K = 32


class FormatError(InputError):
    """A checkpoint of another library that cannot be read, or not without more being said."""


@dataclass(frozen=True)
class Files:
    """The files of one checkpoint: a folder, or a folder of a Hub repo whose files are fetched when asked for.

    `source` is a local folder or a repo id. `chosen` is the file of weights that a user named, as a path in the
    checkpoint's folder; None where the folder alone was named.
    """

    source: str | Path
    subfolder: str = ""
    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | Path | None = None
    local_files_only: bool = False
    chosen: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "subfolder", inside(self.subfolder))

    @property
    def is_local(self) -> bool:
        """Whether the source is a folder of this machine."""
        return Path(self.source).is_dir()

    @property
    def is_offline(self) -> bool:
        """Whether a repo is to be read from what was downloaded before."""
        return not self.is_local and (self.local_files_only or constants.HF_HUB_OFFLINE)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Paths of all files relative to the checkpoint's folder, those in folders below it included."""
        if self.is_local:
            return _names_below(Path(self.source) / self.subfolder)
        if self.is_offline:
            snapshot = snapshot_download(
                str(self.source), revision=self.revision, cache_dir=self.cache_dir, local_files_only=True
            )
            return _names_below(Path(snapshot) / self.subfolder)
        paths = HfApi(token=self.token).list_repo_files(str(self.source), revision=self.revision)
        root_parts = PurePosixPath(self.subfolder).parts
        inside = (PurePosixPath(path) for path in paths)
        return tuple(
            PurePosixPath(*path.parts[len(root_parts) :]).as_posix()
            for path in inside
            if path.parts[: len(root_parts)] == root_parts
        )

    def path(self, name: str) -> Path:
        """Where a file lies on this machine; downloaded if need be."""
        if self.is_local:
            return Path(self.source) / self.subfolder / name
        return Path(
            hf_hub_download(
                str(self.source),
                name,
                subfolder=self.subfolder or None,
                revision=self.revision,
                token=self.token,
                cache_dir=self.cache_dir,
                local_files_only=self.local_files_only,
            )
        )

    def __str__(self) -> str:
        return "/".join(part for part in (str(self.source), self.subfolder) if part)


def _names_below(root: Path) -> tuple[str, ...]:
    return tuple(sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()))


@dataclass
class ConvertedCheckpoint:
    """A checkpoint of another library in our terms.

    Args:
        library: Its name.
        config: Arguments of `MatryoshkaSAEConfig`.
        state: W_enc and W_dec (num_latents, hidden_size), b_enc (num_latents,), b_dec (hidden_size,), and `threshold`
            (num_latents,) where the format has one.
        notes: Sentences for the user: what was folded, what was not recorded.
        uncalibrated: Whether the library selects by rank in a batch and stored no threshold, so that the SAE computes
            nothing for a token alone until one was calibrated.
    """

    library: str
    config: dict[str, Any]
    state: dict[str, Tensor]
    notes: list[str] = field(default_factory=list)
    uncalibrated: bool = False


@dataclass(frozen=True)
class Outline:
    """What a checkpoint's configuration and names say of it, before any weight is fetched; None is not said.

    Args:
        base_model: The language model.
        site: The place that it reads.
        site_out: The place that a transcoder writes.
        num_latents: Size of the dictionary.
        prefix_sizes: Its nested sizes, as it would be read.
        needs: Why it is not read as it is, and what to give where that helps.
    """

    base_model: str | None = None
    site: str | None = None
    site_out: str | None = None
    num_latents: int | None = None
    prefix_sizes: Sequence[int] | None = None
    needs: str | None = None


def outlined(choose: Callable[[], Sequence[int] | None], **known: Any) -> Outline:
    """An outline with the prefix sizes that `choose` gives, or with the reason why it does not."""
    try:
        return Outline(**known, prefix_sizes=choose())
    except FormatError as error:
        return Outline(**known, needs=str(error))


def chosen_prefix_sizes(
    recorded: Sequence[int] | None, given: Sequence[int] | None, num_latents: int, files: Files, notes: list[str]
) -> list[int]:
    """Choose the nesting of a checkpoint whose library trains Matryoshka SAEs.

    It is what the files record, else what is given, else what the authors of a known release state; never invented.

    Raises:
        FormatError: None says it; or the files and what is given differ; or the release has another width.
    """
    if recorded is None and given is None:
        given = released_prefix_sizes(num_latents, files, notes)
    if recorded is None and given is None:
        raise FormatError(
            f"{files} is a Matryoshka SAE of {num_latents} latents, but its files do not say at which sizes it is "
            "nested. Give prefix_sizes (--prefix-sizes), as its authors report them."
        )
    sizes = sorted({*map(int, recorded if recorded is not None else given or ()), num_latents})
    if recorded is not None and given is not None and sizes != sorted({*map(int, given), num_latents}):
        raise FormatError(f"{files} records the prefix sizes {sizes}, but {list(given)} were given; leave them out.")
    return sizes


def single_level(given: Sequence[int] | None, num_latents: int, files: Files, notes: list[str]) -> list[int]:
    """The prefix sizes of a checkpoint whose form does not tell nested dictionaries from plain ones.

    They are as given, or as the authors of a known release state, or else one level.

    Raises:
        FormatError: The release has another width.
    """
    given = released_prefix_sizes(num_latents, files, notes) if given is None else given
    if given is not None:
        return sorted({*map(int, given), num_latents})
    notes.append(
        "Nesting is not recorded in this format, so this is a plain SAE of one level; give prefix_sizes if not."
    )
    return [num_latents]


def released_prefix_sizes(num_latents: int, files: Files, notes: list[str]) -> Sequence[int] | None:
    """The nesting that the authors of a known release state outside of its files; None where it is of none.

    Raises:
        FormatError: The checkpoint has another width than the release.
    """
    release = release_of(files.source, files.subfolder)
    if release is None:
        return None
    sizes = ", ".join(map(str, release.prefix_sizes))
    if release.prefix_sizes[-1] != num_latents:
        raise FormatError(
            f"{files} has {num_latents} latents, but {release.source} says that the SAEs of {release.repo} are nested "
            f"at {sizes}. It is not what was released; if it is nested, give prefix_sizes (--prefix-sizes)."
        )
    notes.append(f"It is nested at {sizes}, as {release.source} says; its files do not.")
    return release.prefix_sizes


def refuse_tokenized(sae: MatryoshkaSAE, library: str) -> None:
    """Refuse to write an SAE that adds a vector of each token, for a library whose SAEs see no tokens.

    Args:
        sae: The SAE.
        library: What the library is called.

    Raises:
        InputError: It is tokenized.
    """
    if sae.config.is_tokenized:
        raise InputError(
            f"{library} cannot express this SAE: it is tokenized, so a vector of the activation's own token is a part "
            "of what it reconstructs, and there an SAE sees activations alone. Train one without --token-lookup."
        )


def target_k(reported: Any, num_latents: int, notes: list[str]) -> float:
    """Choose k of an SAE whose inference does not depend on it: the L0 that its files report, else `DEFAULT_K`."""
    if isinstance(reported, (int, float)) and 0 < reported <= num_latents:
        return reported
    notes.append(f"No L0 is recorded. config.k={min(DEFAULT_K, num_latents)} is a placeholder, used only by training.")
    return min(DEFAULT_K, num_latents)


def peek_json(files: Files, name: str) -> dict[str, Any]:
    """What a JSON file holds; empty where it is absent or no JSON object, and so is not what the caller looks for."""
    if name not in files.names:
        return {}
    try:
        content = parse_json(files.path(name).read_bytes(), name)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def read_json(files: Files, name: str) -> dict[str, Any]:
    """The JSON object in a file. Raises `FormatError` where it is none."""
    try:
        content = parse_json(files.path(name).read_bytes(), f"{name} of {files}")
    except ValueError as error:
        raise FormatError(str(error)) from None
    if not isinstance(content, dict):
        raise FormatError(f"{name} of {files} should hold an object {{...}}, but holds a {type(content).__name__}.")
    return content


def read_safetensors(files: Files, name: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises `FormatError` where it is truncated, corrupt, or something else."""
    path = files.path(name)
    try:
        return plain_names(load_file(path))
    except SafetensorError as error:
        size = path.stat().st_size
        raise FormatError(
            f"{name} of {files} ({size:,} bytes) is no whole safetensors file ({error}); fetch it again. (A file of "
            "about 130 bytes is a git-lfs pointer: run `git lfs pull`.)"
        ) from None


def plain_names(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors by the names that their module gave them, where all carry the prefix of a wrapper around it."""
    for prefix in WRAPPERS:
        if tensors and all(_begins(key, prefix) for key in tensors):
            return plain_names({key.removeprefix(prefix): tensor for key, tensor in tensors.items()})
    return dict(tensors)


def _begins(key: Any, prefix: str) -> bool:
    return isinstance(key, str) and key.startswith(prefix)


def check_tensors(files: Files, name: str, given: Mapping[str, Tensor], needed: Sequence[str]) -> None:
    """Raises `FormatError` that says what is there, where a needed tensor is missing."""
    missing = [key for key in needed if key not in given]
    if missing:
        raise FormatError(
            f"{name} of {files} lacks {', '.join(missing)}; it holds {', '.join(sorted(given)) or 'nothing'}."
        )


def complete_state(files: Files, tensors: Mapping[str, Tensor], output_size: int | None = None) -> dict[str, Tensor]:
    """Make a state in our orientation: shapes that fit, own contiguous memory, and the weights' widest precision.

    Args:
        files: Where the tensors come from, for errors.
        tensors: W_enc and W_dec (num_latents, hidden_size), b_enc (num_latents,), b_dec (hidden_size,); a `threshold`
            may be absent, one number, or (num_latents,). One below zero becomes zero: latent activations are never
            negative, so both keep the same latents.
        output_size: Of a transcoder, the size of what it writes: W_dec is then (num_latents, output_size), b_dec
            (output_size,), and there may be a W_skip (output_size, hidden_size).

    Returns:
        The tensors, a threshold for every latent where there was any.

    Raises:
        FormatError: For tensors that do not belong together, and for numbers that are none.
    """
    W_enc = tensors["W_enc"]
    if W_enc.ndim != 2:
        raise FormatError(f"The encoder of {files} is {W_enc.dtype} of shape {tuple(W_enc.shape)}; expected a matrix.")
    num_latents, hidden_size = W_enc.shape
    state = dict(tensors)
    if "threshold" in state and state["threshold"].numel() == 1:
        state["threshold"] = state["threshold"].reshape(()).expand(num_latents)
    written = hidden_size if output_size is None else output_size
    shapes = {"W_enc": (num_latents, hidden_size), "W_dec": (num_latents, written), "b_dec": (written,)}
    shapes["W_skip"] = (written, hidden_size)
    for name, tensor in state.items():
        expected = shapes.get(name, (num_latents,))
        if tuple(tensor.shape) != expected:
            writes = "" if output_size is None else f" that writes {written}"
            raise FormatError(
                f"The tensors of {files} do not belong together: beside an encoder of {num_latents} latents and "
                f"hidden size {hidden_size}{writes}, {name} should be {expected}, but is {tuple(tensor.shape)}."
            )
        _refuse_what_is_no_number(files, name, tensor)
    if "threshold" in state:
        state["threshold"] = state["threshold"].float().clamp_min(0)
    return {name: tensor.contiguous().clone() for name, tensor in in_one_dtype(state).items()}


def _refuse_what_is_no_number(files: Files, name: str, tensor: Tensor) -> None:
    """Raises `FormatError` for integers, and for NaN and infinity, saying where."""
    if not tensor.is_floating_point():
        raise FormatError(f"{name} of {files} is {tensor.dtype}; weights should be floating-point numbers.")
    wrong = ~tensor.float().isfinite()
    if wrong.any():
        place = tuple(wrong.nonzero()[0].tolist())
        raise FormatError(
            f"{name} of {files} holds {tensor[place].item()} at {list(place)} ({int(wrong.sum()):,} of "
            f"{tensor.numel():,} numbers are NaN or infinite), so nothing could be computed with it. Fetch it again, "
            "or take another checkpoint of the run."
        )


def in_one_dtype(state: Mapping[str, Tensor], least: dtype | None = None) -> dict[str, Tensor]:
    """The weights in the widest precision that one of them has (or `least` has), in which all of them are exact.

    What is kept in single precision anyway (thresholds, statistics) stays as it is.
    """
    names = [name for name in ("W_enc", "W_dec", "b_enc", "b_dec", "W_skip") if name in state]
    widest = least or state[names[0]].dtype
    for name in names:
        widest = promote_types(widest, state[name].dtype)
    return {name: tensor.to(widest) if name in names else tensor for name, tensor in state.items()}


def refuse_disagreement(files: Files, name: str, recorded: Any, weights: str, found: Any) -> None:
    """Raises `FormatError` where a configuration records for `name` what the weights do not say; None is silence."""
    if recorded is not None and recorded != found:
        raise FormatError(
            f"{files}: the configuration says {name}={recorded}, but {weights} says {found}. They do not belong "
            "together; fetch both again."
        )


def refuse_many(files: Files, marker: str, library: str) -> None:
    """Raises `FormatError` that lists what to choose from, where `marker` lies only in folders below this one."""
    if marker in files.names:
        return
    found = (str(PurePosixPath(name).parent) for name in files.names if PurePosixPath(name).name == marker)
    # Layer 10 behind layer 9.
    folders = sorted(
        found, key=lambda folder: [int(part) if part.isdigit() else part for part in DIGITS.split(folder)]
    )
    more = f" and {len(folders) - NAMED_FOLDERS} more" if len(folders) > NAMED_FOLDERS else ""
    own = sorted({str(PurePosixPath(name).parent) for name in files.names if PurePosixPath(name).name in OWN_WEIGHTS})
    beside = f" Beside them are safetensors models, ours or others': {', '.join(own[:NAMED_FOLDERS])}." if own else ""
    raise FormatError(
        f"{files} holds {len(folders)} {library} checkpoint(s) in folders; choose one with subfolder=: "
        f"{', '.join(folders[:NAMED_FOLDERS])}{more}.{beside}"
    )


def _by_number(name: str) -> list[tuple[str, int]]:
    """A key by which layer 10 comes behind layer 9: the text before each number, and the number."""
    parts = [*DIGITS.split(name), "-1"]
    return [(text, int(number)) for text, number in zip(parts[::2], parts[1::2], strict=True)]


def holds(files: Files, marker: str) -> bool:
    """Whether a file of that name is here or in a folder below."""
    return any(PurePosixPath(name).name == marker for name in files.names)
