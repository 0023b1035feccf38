"""What this Space opens: `space.json` beside `app.py`, or the file that the environment variable MSAE_SPACE names.

One file serves a published Space and a local run alike, so that what runs here is what runs there.
"""

import json
import os
from dataclasses import dataclass, fields
from pathlib import Path

VARIABLE = "MSAE_SPACE"
FOLDER = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Settings:
    """saes: what the page offers, Hub repos or folders of this machine; the first is opened.
    meta_sae: an SAE trained on the decoder rows of the first one, for the Compare tab.
    title: of the page.
    """

    saes: tuple[str, ...]
    meta_sae: str | None = None
    title: str = "Matryoshka SAE"

    def __post_init__(self) -> None:
        if not self.saes or not all(isinstance(sae, str) and sae for sae in self.saes):
            raise ValueError(f"`saes` must name at least one SAE, a Hub repo or a folder; got {self.saes!r}.")


def read_settings() -> Settings:
    """Raises ValueError, in words, for a file that is missing or says something else."""
    path = Path(os.environ.get(VARIABLE) or FOLDER / "space.json")
    if not path.is_file():
        raise ValueError(
            f"There is no {path}. It says which SAE is shown: "
            '{"saes": ["owner/name"]}. `hf-msae demo`, `hf-msae space run` and `hf-msae space push` write it.'
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        unknown = sorted(set(values) - {field.name for field in fields(Settings)})
        if unknown:
            raise ValueError(f"unknown key {unknown[0]!r}")
        return Settings(**{**values, "saes": tuple(values["saes"])})
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({type(error).__name__}: {error}).") from error
