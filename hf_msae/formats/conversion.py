"""Other libraries' checkpoints: whose a checkpoint is, and converting it, in either direction.

`MatryoshkaSAE.from_pretrained`, `from_saelens`, `to_saelens` and their kin end here. `modeling/` cannot import what
lies above it, so it knows this module by its name, which importing hf_msae gives it.
"""

import importlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor
from transformers.utils import cached_file

from hf_msae.atomic_files import atomic_folder
from hf_msae.errors import OutputExistsError
from hf_msae.formats.common import ConvertedCheckpoint, Files, FormatError, Outline, refuse_tokenized
from hf_msae.formats.libraries import FORMATS, NAMED_BY_FILE, WRITABLE
from hf_msae.formats.naming import describe_absence, describe_name, first_few, natural_order
from hf_msae.modeling import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.modeling.untrusted import read_json

logger = logging.getLogger(__name__)

OURS = MatryoshkaSAEConfig.model_type
# What ends the name of a file of weights, where a user gives one in place of its folder.
WEIGHTS = (".pt", ".pth", ".npz", ".safetensors")
# A folder of a run in which files of weights lie, whose configuration is one folder up.
CHECKPOINTS = "checkpoints"


def _format(name: str) -> ModuleType:
    if name not in {*FORMATS, *WRITABLE}:
        raise FormatError(f"There is no format {name!r}; there are {', '.join(FORMATS)}.")
    return importlib.import_module(f"hf_msae.formats.{name}")


def convert(
    source: str | Path,
    folder: str | Path,
    *,
    to: str = "hf_msae",
    name: str | None = None,
    prefix_sizes: Sequence[int] | None = None,
    prefix: int | None = None,
    complete: Callable[[MatryoshkaSAE], object] | None = None,
    subfolder: str = "",
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> MatryoshkaSAE:
    """Read another library's checkpoint, or one of ours, and write it for us, or for another library.

    Args:
        source: A folder, a repo of the Hub, or a file of weights.
        folder: Where to; it must not exist yet, and appears when it is whole.
        to: "hf_msae", or one of `WRITABLE`.
        name: The form of the source, of `FORMATS`; None for whichever it is.
        prefix_sizes: The nested sizes, where the files do not record them.
        prefix: Keep only the first latents.
        complete: Called with the SAE before it is written, to record what the files do not, such as
            `hf_msae.evaluation.complete_on_text`; an SAE that lacks a threshold is then read without one.
        subfolder: A folder in the source, or a file of weights.
        revision: Branch, tag or commit of a repo.
        token: A token that may read it; the one that is logged in by default.
        cache_dir: The Hub's cache, where another than the usual one is meant.
        local_files_only: Whether to read only what was downloaded before.

    Returns:
        The SAE that was written.

    Raises:
        OutputExistsError: The folder exists.
        FormatError: The source is no SAE that is known, or has no equal here.
        InputError: The other library cannot express this SAE.
    """
    folder = Path(folder)
    if folder.exists():
        raise OutputExistsError(f"{folder} exists already; give a folder that does not, or delete it.")
    hub: dict[str, Any] = {
        "subfolder": subfolder,
        "revision": revision,
        "token": token,
        "cache_dir": cache_dir,
        "local_files_only": local_files_only,
    }
    if name is not None or (complete is not None and recognise(locate(source, **hub)) is not None):
        sae = load_library_checkpoint(MatryoshkaSAE, source, name, prefix_sizes, complete is not None, **hub)
        sae = sae if prefix is None else sae.truncate(prefix)
    else:
        options: dict[str, Any] = {} if prefix_sizes is None else {"prefix_sizes": prefix_sizes}
        sae = MatryoshkaSAE.from_pretrained(source, prefix=prefix, **hub, **options)
    if complete is not None:
        complete(sae)
    if to == "hf_msae":
        with atomic_folder(folder) as draft:
            sae.save_pretrained(draft)
    else:
        write_library_checkpoint(sae, folder, to)
    return sae


def recognise(files: Files) -> str | None:
    """Say which of `FORMATS` a checkpoint has; None where it is none of them."""
    return next((name for name in FORMATS if _format(name).recognises(files)), None)


def locate(source: str | Path, subfolder: str | None = None, **hub: Any) -> Files:
    """Find the checkpoint that is meant.

    Args:
        source: A folder, a repo of the Hub, or a file of weights.
        subfolder: A folder in it, or a file of weights.
        hub: `revision`, `token`, `cache_dir`, `local_files_only`.

    Returns:
        Its files; `chosen` is the file of weights, where one was named.
    """
    place = PurePosixPath(subfolder or "")
    if Path(source).is_file():
        source, place = Path(source).parent, PurePosixPath(Path(source).name)
        if source.name == CHECKPOINTS:
            source, place = source.parent, source.name / place
    local = Path(source).is_dir()
    if not ((Path(source) / place).is_file() if local else place.suffix in WEIGHTS):
        return Files(source, subfolder="" if place == PurePosixPath() else str(place), **hub)
    depth = 2 if place.parent.name == CHECKPOINTS else 1
    folder = PurePosixPath(*place.parts[:-depth])
    subfolder = "" if folder == PurePosixPath() else str(folder)
    return Files(source, subfolder=subfolder, chosen="/".join(place.parts[-depth:]), **hub)


def load_library_checkpoint(
    cls: type[MatryoshkaSAE],
    source: str | Path,
    name: str | None,
    prefix_sizes: Sequence[int] | None = None,
    calibrating: bool = False,
    **hub: Any,
) -> MatryoshkaSAE:
    """Make a model from another library's checkpoint; what a user should know of it is logged.

    Args:
        cls: The class of the model.
        source: A folder, a repo of the Hub, or a file of weights.
        name: One of `FORMATS`; None for whichever it is.
        prefix_sizes: The nested sizes, where the files do not record them.
        calibrating: Whether an SAE that needs a threshold to compute anything is read without one, for the caller to
            set.
        hub: `subfolder`, `revision`, `token`, `cache_dir`, `local_files_only`.

    Returns:
        The SAE.

    Raises:
        FormatError: It is not of that library, or has no equal here.
    """
    files = locate(source, **hub)
    name = recognise(files) if name is None else name
    if name is None:
        raise FormatError(_nothing_known(files))
    module = _format(name)
    if files.chosen is None and not module.recognises(files):
        raise FormatError(f"{files} is no {module.LIBRARY} checkpoint: it holds {first_few(files.names)}.")
    config, state = _read(name, files, prefix_sizes, calibrating)
    model: Any = cls.from_pretrained(None, config=config, state_dict=state, dtype=state["W_dec"].dtype)
    model.config.name_or_path = str(files)
    return model


def read_library_checkpoint(
    source: str | Path, prefix_sizes: Sequence[int] | None = None, **hub: Any
) -> tuple[MatryoshkaSAEConfig, dict[str, Tensor]] | None:
    """Read another library's checkpoint, if it is one.

    Args:
        source: A folder, a repo of the Hub, or a file of weights.
        prefix_sizes: The nested sizes, where the files do not record them.
        hub: `subfolder`, `revision`, `token`, `cache_dir`, `local_files_only`.

    Returns:
        Configuration and state; None for a checkpoint of ours.

    Raises:
        FormatError: It is neither, and what it is; or it has no equal here.
    """
    if not Path(source).exists() and str(source).startswith((".", "/", "~")):
        raise FormatError(f"There is no folder {source}.")
    hub = {key: value for key, value in hub.items() if value is not None and key != "force_download"}
    files = locate(source, **hub)
    content = _config_content(files, hub)
    if content is not None and content.get("model_type") == OURS:
        if files.chosen is not None:
            raise FormatError(f"{files.chosen} is a file of the SAE in {files}; give that folder.")
        return None
    if content is not None and "model_type" in content:
        raise FormatError(
            f"{files} holds a {content['model_type']} model, not an SAE; give the repo or folder of one."
        )
    name = recognise(files)
    if name is None:
        raise FormatError(_nothing_known(files))
    return _read(name, files, prefix_sizes)


def write_library_checkpoint(sae: MatryoshkaSAE, folder: str | Path, name: str) -> None:
    """Write what the loader of another library reads.

    Args:
        sae: The SAE.
        folder: Where to; absent or empty.
        name: One of `WRITABLE`.

    Raises:
        FormatError: There is no such format to write.
        InputError: The library cannot express this SAE.
        OutputExistsError: Something is in the folder.
    """
    if name not in WRITABLE:
        raise FormatError(f"SAEs can be written for {' and '.join(WRITABLE)}, not for {name!r}.")
    refuse_tokenized(sae, library_of(name))
    _format(name).write(sae, Path(folder))


def _read(
    name: str, files: Files, prefix_sizes: Sequence[int] | None, calibrating: bool = False
) -> tuple[MatryoshkaSAEConfig, dict[str, Tensor]]:
    module = _format(name)
    _refuse_other_file(module, name, files)
    converted: ConvertedCheckpoint = module.read(files, prefix_sizes)
    if converted.uncalibrated and not calibrating:
        raise FormatError(
            f"{files} is a batch TopK SAE without a threshold: {converted.library} keeps the largest activations of a "
            "whole batch, so that no token has latents of its own. Give it a threshold, set on text: `hf-msae convert "
            f"{files} FOLDER --measure --model MODEL --dataset TEXT`, and load FOLDER."
        )
    for note in converted.notes:
        logger.warning("%s: %s", files, note)
    config = MatryoshkaSAEConfig(**{"converted_from": converted.library} | converted.config)
    zeros = {key: torch.zeros(config.num_latents) for key in ("threshold", "max_activation", "firing_rate")}
    return config, zeros | converted.state


def _refuse_other_file(module: ModuleType, name: str, files: Files) -> None:
    """Raises `FormatError` where a file was named that its format does not read as weights."""
    if files.chosen is None or any(PurePosixPath(files.chosen).match(pattern) for pattern in module.FILES):
        return
    raise FormatError(
        f"{files.chosen} of {files} is not what a {module.LIBRARY} checkpoint keeps its weights in "
        f"({', '.join(module.FILES)}); give one of these, or the folder."
    )


def _config_content(files: Files, hub: dict[str, Any]) -> dict[str, Any] | None:
    """What config.json says; None where there is none. What cannot be reached raises as in transformers."""
    path: Any = None
    hub = hub | {"subfolder": files.subfolder}
    if not files.is_offline:
        try:
            path = cached_file(files.source, "config.json", **hub, _raise_exceptions_for_missing_entries=False)
        except OSError as error:
            meant = describe_name(str(files.source))
            if meant is None:
                raise
            raise FormatError(f"{files.source} is no Hub repo, nor a folder. {meant}") from error
    elif "config.json" in files.names:
        path = files.path("config.json")
    if path is None:
        return None
    try:
        return read_json(path)
    except ValueError as error:
        raise FormatError(str(error)) from error


def _nothing_known(files: Files) -> str:
    if not files.names and files.subfolder:
        return describe_absence(files)
    folders = sorted({name.rpartition("/")[0] for name in files.names if name.endswith("/config.json")})
    if folders:
        return f"{files} has no SAE at its root. Give one of its folders as subfolder: {first_few(folders)}."
    known = ", ".join(_format(name).LIBRARY for name in FORMATS)
    return f"{files} holds no SAE that is known here (ours, or of {known}), but {first_few(files.names)}."


def describe_library_checkpoints(files: Files) -> str | None:
    """What another library's checkpoints in a folder or repo are, and what reads them; None where there are none."""
    name = recognise(files)
    if name is None:
        return None
    module = _format(name)
    places = places_of_weights(name, files)
    if not places:
        return f"It holds the configuration of a {module.LIBRARY} checkpoint, but not its weights."
    count = "a checkpoint" if len(places) == 1 else f"{len(places)} checkpoints"
    where, command = str(files.source), f"hf-msae convert {files.source} DEST"
    call = f"MatryoshkaSAE.from_pretrained({where!r})"
    if places[0] != ".":
        call, command = f"{call[:-1]}, subfolder={places[0]!r})", f"{command} --subfolder {places[0]}"
    return (
        f"It holds {count} of {module.LIBRARY}{'' if places == ['.'] else f' ({first_few(places)})'}: {call} reads "
        f"{'it' if len(places) == 1 else 'one'}, and `{command}` makes an SAE of it that is listed, pushed and pulled "
        "like any other."
    )


def places_of_weights(name: str, files: Files) -> list[str]:
    """Where checkpoints of a format are in a folder or repo: what is given as their subfolder, "." for the root.

    These are folders; of a trainer that has nothing but weights in training, and of formats that name each SAE by its
    file where there are several, files.
    """
    weights = [path for path in map(PurePosixPath, files.names) if any(map(path.match, _format(name).FILES))]
    if name in NAMED_BY_FILE and len(weights) > 1:
        return sorted(map(str, weights), key=natural_order)
    whole = {path.parent for path in weights if path.parent.name != CHECKPOINTS}
    in_training = {path for path in weights if path.parent.name == CHECKPOINTS and path.parent.parent not in whole}
    return sorted(map(str, whole | in_training), key=natural_order)


def outline(name: str, source: str | Path, place: str, **hub: Any) -> Outline:
    """What the configuration and the names of a checkpoint say of it; no weights are fetched.

    Args:
        name: Its form, of `FORMATS`.
        source: A folder or a repo of the Hub.
        place: Where in it, as `places_of_weights` gives it.
        hub: `revision`, `token`, `cache_dir`, `local_files_only`.

    Returns:
        The outline; where the checkpoint has no equal here, with the reason.
    """
    files = locate(source, None if place == "." else place, **hub)
    try:
        return cast(Outline, _format(name).outline(files))
    except FormatError as error:
        return Outline(needs=str(error))
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        return Outline(needs=f"Its configuration is not as {_format(name).LIBRARY} writes it ({error!r:.200}).")


def library_of(name: str) -> str:
    """What the library of a format is called."""
    return str(_format(name).LIBRARY)


def to_saebench(sae: MatryoshkaSAE, prefix: int | None = None) -> Any:
    """See `MatryoshkaSAE.to_saebench`."""
    from hf_msae.formats import saebench

    refuse_tokenized(sae, "SAEBench")
    return saebench.to_saebench(sae, prefix)
