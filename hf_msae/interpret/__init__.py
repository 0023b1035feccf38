"""What a latent means: contexts, effects on the output, the hierarchy between levels."""

import sys
from types import ModuleType
from typing import Any

from hf_msae.interpret.edges import find_hierarchy
from hf_msae.interpret.hierarchy import Edge, Hierarchy, HierarchySettings
from hf_msae.interpret.labels import LabelError, Labeller
from hf_msae.interpret.pages import Context, Label, LatentPage
from hf_msae.interpret.pipeline import interpret, write_labels
from hf_msae.interpret.scan import Scan, scan
from hf_msae.interpret.search import search_firing, search_labels, search_promoting
from hf_msae.interpret.store import Interpretation, InterpretationError, stream_pages
from hf_msae.interpret.trees import measure_hierarchy, read_hierarchy


class _Room(ModuleType):
    """`hf_msae.interpret` is a room and, as `from hf_msae import interpret`, what people call to fill it."""

    def __call__(self, *args: Any, **options: Any) -> Interpretation:
        return interpret(*args, **options)


sys.modules[__name__].__class__ = _Room

__all__ = [
    "Context",
    "Edge",
    "Hierarchy",
    "HierarchySettings",
    "Interpretation",
    "InterpretationError",
    "Label",
    "LabelError",
    "Labeller",
    "LatentPage",
    "Scan",
    "find_hierarchy",
    "interpret",
    "measure_hierarchy",
    "read_hierarchy",
    "scan",
    "search_firing",
    "search_labels",
    "search_promoting",
    "stream_pages",
    "write_labels",
]
