"""Other libraries' checkpoints: reading them into a `MatryoshkaSAE`, and writing what their own loaders read."""

from typing import TYPE_CHECKING

from hf_msae.importing import lazy_names

if TYPE_CHECKING:
    from hf_msae.formats.conversion import convert
    from hf_msae.formats.libraries import FORMATS, WRITABLE
else:
    # Commands read the names of formats before anything that takes time is imported.
    _HOMES = {
        "hf_msae.formats.conversion": ("convert",),
        "hf_msae.formats.libraries": ("FORMATS", "WRITABLE"),
    }
    __getattr__, __dir__ = lazy_names(__name__, {name: home for home, names in _HOMES.items() for name in names})

__all__ = ["FORMATS", "WRITABLE", "convert"]
