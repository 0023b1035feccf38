"""Sharing SAEs: the model card, publishing and fetching, other libraries' checkpoints."""

from hf_msae.hub.catalogue import FoundSAE, find_saes
from hf_msae.hub.index import NoSAEError, SAEEntry, list_saes, load_saes
from hf_msae.hub.publishing import push_folder
from hf_msae.hub.pulling import cache_folder, pull
from hf_msae.hub.retrying import PublishError

__all__ = [
    "FoundSAE",
    "NoSAEError",
    "PublishError",
    "SAEEntry",
    "cache_folder",
    "find_saes",
    "list_saes",
    "load_saes",
    "pull",
    "push_folder",
]
