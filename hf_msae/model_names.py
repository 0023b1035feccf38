"""What the name of a language model stands for: a Hub id, a folder, the story model, or a PEFT adapter on one."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_msae.worlds.stories import STORIES, story_lm_path

# Options of `from_pretrained` that configuration, tokenizer and weights all take.
HUB_OPTIONS = ("token", "cache_dir", "local_files_only")


@dataclass(frozen=True)
class Origin:
    """Where a language model came from.

    Args:
        name: The model, or the one below the adapter: a Hub id, a folder or "stories".
        revision: Its branch, tag or commit as it was asked for; once it is loaded, the commit where it is known.
        adapter: The PEFT adapter on it, if there is one.
        adapter_revision: As `revision`, of the adapter.
    """

    name: str
    revision: str | None = None
    adapter: str | None = None
    adapter_revision: str | None = None


def place_of(name: str | Path) -> str:
    """What `from_pretrained` takes for a name."""
    return str(story_lm_path()) if name == STORIES else os.path.expanduser(name)


def options_of_files(hub: Mapping[str, Any]) -> dict[str, Any]:
    """Of what `from_pretrained` is told, that which also finds a single file of a repo."""
    return {option: hub[option] for option in ("revision", *HUB_OPTIONS) if option in hub}


def some_of(keys: set[str]) -> str:
    """Names of weights for a message: three at most, and how many more there are."""
    shown = ", ".join(sorted(keys)[:3])
    return shown if len(keys) <= 3 else f"{shown} and {len(keys) - 3} more"
