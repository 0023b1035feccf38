"""Fields that several dataclasses of arguments have, of how text is read for activations, and what their flags say.

Read before anything that takes time is imported.
"""

from dataclasses import field
from typing import Any

from hf_msae.outliers import NORM_OUTLIER_MULTIPLE


def packing() -> Any:
    """Whether windows are filled from one document after another."""
    return field(default=True, metadata={"help": "Pack documents into full windows."})


def lm_batch_size() -> Any:
    """How many windows the language model reads at once."""
    return field(default=16, metadata={"help": "Windows per forward pass."})


def norm_outlier_multiple(verb: str = "Leave out", where: str = "") -> Any:
    """Beyond which norm activations are attention sinks.

    Args:
        verb: what is done with them.
        where: a clause that says when.
    """
    words = f"{verb} tokens whose norm exceeds this multiple of the median{where}; 0 keeps all."
    return field(default=NORM_OUTLIER_MULTIPLE, metadata={"help": words})


# For what reads activations for an SAE that is finished, and has kept the limit of its training.
WITHOUT_A_LIMIT = ", where the SAE does not record a limit of its own"
