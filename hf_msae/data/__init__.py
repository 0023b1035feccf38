"""From documents to shuffled batches of activations, and activations on disk."""

from hf_msae.data.cache import CachedActivations, cache_activations
from hf_msae.data.cache_files import CacheError, is_activation_cache
from hf_msae.data.caching import make_activation_cache
from hf_msae.data.documents import Documents
from hf_msae.data.fingerprints import differences, fingerprint
from hf_msae.data.forward import TOKEN_IDS, find_norm_limits, harvest
from hf_msae.data.hash_split import Split
from hf_msae.data.holding_out import HeldOutWindows, TrainingHoldOut, hold_out, hold_out_for_training
from hf_msae.data.loading import as_documents, load_documents
from hf_msae.data.rows import Document
from hf_msae.data.sources import DatasetError
from hf_msae.data.stream import ActivationStream, BatchIterator
from hf_msae.data.windows import TokenBatch, TokenWindows, Window, collate, count_tokens, pad_id, vocabulary
from hf_msae.outliers import ActivationError

__all__ = [
    "TOKEN_IDS",
    "ActivationError",
    "ActivationStream",
    "BatchIterator",
    "CacheError",
    "CachedActivations",
    "DatasetError",
    "Document",
    "Documents",
    "HeldOutWindows",
    "Split",
    "TokenBatch",
    "TokenWindows",
    "TrainingHoldOut",
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
    "hold_out_for_training",
    "is_activation_cache",
    "load_documents",
    "make_activation_cache",
    "pad_id",
    "vocabulary",
]
