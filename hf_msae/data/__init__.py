"""From documents to shuffled batches of activations, and activations on disk."""

from hf_msae.data.cache import CachedActivations, CacheError, cache_activations, is_activation_cache
from hf_msae.data.documents import Document, Documents, as_documents, load_documents
from hf_msae.data.fingerprints import differences, fingerprint
from hf_msae.data.forward import ActivationError, find_norm_limits, harvest, within_limit
from hf_msae.data.sources import DatasetError
from hf_msae.data.stream import ActivationStream, BatchIterator
from hf_msae.data.windows import TokenBatch, TokenWindows, Window, collate, count_tokens, hold_out, pad_id

__all__ = [
    "ActivationError",
    "ActivationStream",
    "BatchIterator",
    "CacheError",
    "CachedActivations",
    "DatasetError",
    "Document",
    "Documents",
    "TokenBatch",
    "TokenWindows",
    "Window",
    "as_documents",
    "cache_activations",
    "collate",
    "count_tokens",
    "differences",
    "find_norm_limits",
    "fingerprint",
    "harvest",
    "hold_out",
    "is_activation_cache",
    "load_documents",
    "pad_id",
    "within_limit",
]
