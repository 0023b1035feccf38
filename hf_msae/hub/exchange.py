"""What `MatryoshkaSAE` hands over to this package: publishing, and other libraries' checkpoints.

`modeling/` cannot import what lies above it, so importing hf_msae makes this module `MatryoshkaSAE.exchange`.
"""

import importlib
import logging
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from transformers.utils import cached_file

from hf_msae.hub.formats.common import Files, Foreign, FormatError
from hf_msae.modeling import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.modeling.untrusted import read_json

logger = logging.getLogger(__name__)

# Modules of hf_msae.hub.formats, in the order in which they are asked whether a checkpoint is theirs.
FORMATS = ("saelens", "dictionary_learning", "sparsify", "gemma_scope", "bussmann", "openmoss")
WRITABLE = ("saelens", "sparsify")
OURS = MatryoshkaSAEConfig.model_type
NAMED_FILES = 8


def _format(name: str) -> ModuleType:
    if name not in FORMATS:
        raise FormatError(f"There is no format {name!r}; there are {', '.join(FORMATS)}.")
    return importlib.import_module(f"hf_msae.hub.formats.{name}")


def recognise(files: Files) -> str | None:
    """Which of `FORMATS` a checkpoint has; None where it is none of them."""
    return next((name for name in FORMATS if _format(name).recognises(files)), None)


def load_foreign(
    cls: type[MatryoshkaSAE], source: str | Path, name: str, prefix_sizes: Sequence[int] | None = None, **hub: Any
) -> MatryoshkaSAE:
    """A model from a checkpoint of the library `name`, one of `FORMATS`; what a user should know is logged.

    Raises `FormatError`, a `ValueError`, for a checkpoint that is not of that library or has no equal here.
    """
    files = Files(source, **hub)
    module = _format(name)
    if not module.recognises(files):
        raise FormatError(f"{files} is no {module.LIBRARY} checkpoint: it holds {_listed(files)}.")
    config, state = _read(name, files, prefix_sizes)
    model: Any = cls.from_pretrained(None, config=config, state_dict=state, dtype=state["W_dec"].dtype)
    model.config.name_or_path = str(files)
    return model


def read_if_foreign(
    source: str | Path, prefix_sizes: Sequence[int] | None = None, **hub: Any
) -> tuple[MatryoshkaSAEConfig, dict[str, Tensor]] | None:
    """Configuration and state of another library's checkpoint; None for one of ours.

    Raises `FormatError` for a folder or repo that holds neither, and says what it holds.
    """
    if not Path(source).is_dir() and str(source).startswith((".", "/", "~")):
        raise FormatError(f"There is no folder {source}.")
    hub = {key: value for key, value in hub.items() if value is not None and key != "force_download"}
    files = Files(source, **hub)
    content = _config_content(files, hub)
    if content is not None and content.get("model_type") == OURS:
        return None
    if content is not None and "model_type" in content:
        raise FormatError(
            f"{files} holds a {content['model_type']} model, not an SAE; give the repo or folder of one."
        )
    name = recognise(files)
    if name is None:
        raise FormatError(_nothing_known(files))
    return _read(name, files, prefix_sizes)


def write_foreign(sae: MatryoshkaSAE, folder: str | Path, name: str) -> None:
    """Write what the loader of the library `name` reads; raises `FormatError` for what it cannot express."""
    if name not in WRITABLE:
        raise FormatError(f"SAEs can be written for {' and '.join(WRITABLE)}, not for {name!r}.")
    _format(name).write(sae, Path(folder))


def _read(
    name: str, files: Files, prefix_sizes: Sequence[int] | None
) -> tuple[MatryoshkaSAEConfig, dict[str, Tensor]]:
    foreign: Foreign = _format(name).read(files, prefix_sizes)
    for note in foreign.notes:
        logger.warning("%s: %s", files, note)
    config = MatryoshkaSAEConfig(**foreign.config, converted_from=foreign.library)
    zeros = {key: torch.zeros(config.num_latents) for key in ("threshold", "max_activation", "firing_rate")}
    return config, zeros | foreign.state


def _config_content(files: Files, hub: dict[str, Any]) -> dict[str, Any] | None:
    """What config.json says; None where there is none. What cannot be reached raises as in transformers."""
    path: Any = None
    if not files.is_offline:
        path = cached_file(files.source, "config.json", **hub, _raise_exceptions_for_missing_entries=False)
    elif "config.json" in files.names:
        path = files.path("config.json")
    if path is None:
        return None
    try:
        return read_json(path)
    except ValueError as error:
        raise FormatError(str(error)) from error


def _listed(files: Files) -> str:
    shown = ", ".join(files.names[:NAMED_FILES])
    more = len(files.names) - NAMED_FILES
    return (shown + (f" and {more} more files" if more > 0 else "")) or "no files"


def _nothing_known(files: Files) -> str:
    folders = sorted({name.rpartition("/")[0] for name in files.names if name.endswith("/config.json")})
    if folders:
        return (
            f"{files} has no SAE at its root. Give one of its folders as subfolder: {', '.join(folders[:NAMED_FILES])}"
            f"{' ...' if len(folders) > NAMED_FILES else ''}."
        )
    known = ", ".join(_format(name).LIBRARY for name in FORMATS)
    return f"{files} holds no SAE that is known here (ours, or of {known}), but {_listed(files)}."


def to_saebench(sae: MatryoshkaSAE, prefix: int | None = None) -> Any:
    """See `MatryoshkaSAE.to_saebench`."""
    from hf_msae.hub.formats import saebench

    return saebench.to_saebench(sae, prefix)


def push(sae: MatryoshkaSAE, repo_id: str, **options: Any) -> str:
    """See `MatryoshkaSAE.push_to_hub`."""
    from hf_msae.hub import publishing

    return publishing.push(sae, repo_id, **options)
