"""Sharing SAEs: the model card, publishing and fetching, other libraries' checkpoints."""

from hf_msae.hub.index import NoSAEError, SAEEntry, list_saes, load_saes
from hf_msae.hub.publishing import PublishError, push_folder
from hf_msae.hub.pulling import cache_folder, pull

__all__ = [
    "NoSAEError",
    "PublishError",
    "SAEEntry",
    "cache_folder",
    "list_saes",
    "load_saes",
    "pull",
    "push_folder",
]
