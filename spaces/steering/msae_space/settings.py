"""What this Space opens: `space.json` beside `app.py`, or the file that the environment variable MSAE_SPACE names.

One file serves a published Space and a local run alike, so that what runs here is what runs there.
"""

import json
import os
from dataclasses import dataclass, fields
from pathlib import Path

from hf_msae.errors import InputError

VARIABLE = "MSAE_SPACE"
FOLDER = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Settings:
    """What a page shows.

    Args:
        saes: What the page offers, Hub repos or folders of this machine; the first is opened.
        meta_sae: An SAE trained on the decoder rows of the first one, for the Compare tab.
        title: Of the page.

    Raises:
        InputError: No SAE is named, or a value is no text.
    """

    saes: tuple[str, ...]
    meta_sae: str | None = None
    title: str = "Matryoshka SAE"

    def __post_init__(self) -> None:
        if not self.saes or not all(isinstance(sae, str) and sae for sae in self.saes):
            raise InputError(f"`saes` must name at least one SAE, a Hub repo or a folder; got {self.saes!r:.100}.")
        if not isinstance(self.meta_sae, str | None) or not isinstance(self.title, str):
            raise InputError("`meta_sae` names an SAE or is null, and `title` is a text.")


def read_settings() -> Settings:
    """The settings of this Space.

    Raises:
        InputError: The file is missing, or says something else.
    """
    path = Path(os.environ.get(VARIABLE) or FOLDER / "space.json")
    if not path.is_file():
        raise InputError(
            f"There is no {path}. It says which SAE is shown: "
            '{"saes": ["owner/name"]}. `hf-msae demo`, `hf-msae space run` and `hf-msae space push` write it.'
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read ({type(error).__name__}: {str(error)[:200]}).") from error
    if not isinstance(values, dict) or not isinstance(values.get("saes"), list):
        raise InputError(f'{path} cannot be read: it must be {{"saes": [...]}}, with a list of SAEs.')
    unknown = sorted(set(values) - {field.name for field in fields(Settings)})
    if unknown:
        raise InputError(f"{path} cannot be read: unknown key {unknown[0]!r:.100}.")
    return Settings(**{**values, "saes": tuple(values["saes"])})
