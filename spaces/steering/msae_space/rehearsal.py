"""What every tab needs of an SAE, tried once when it is opened.

A site may be one that a forward passes and `generate` cuts short (the head), that is of another width, or that holds
something else than a vector for each token; weights may be such that nothing finite comes out. Whatever it is, it is
told at the door, rather than in every tab.
"""

import logging
import math

from hf_msae.steering import LatentEdit, Steering
from msae_space.generation import lent_stream
from msae_space.reading import mean_norm, read, read_levels
from msae_space.workbench import SpaceError, Workbench, first_line

logger = logging.getLogger(__name__)

PASSAGE = (
    "Once upon a time, there was a kind girl. She lived near the forest with her mother and a small dog. "
    "One day, they went to the river."
)
NUM_ORDINARY = 16


def rehearse(bench: Workbench) -> float:
    """Reads, measures levels and steers a text; the mean length of the activations at the site. Raises SpaceError."""
    try:
        return _rehearse(bench)
    except Exception as error:  # the SAE and the model are anybody's, and so is what they make of each other
        logger.info("%s was refused at rehearsal.", bench.key, exc_info=error)
        config = bench.sae.config
        raise SpaceError(
            f"This page cannot work with an SAE at {config.site} of {config.base_model}: {first_line(error)}"
        ) from error


def _rehearse(bench: Workbench) -> float:
    text = passage(bench)
    norm = mean_norm(bench, text)
    found = [value for active in read(bench, text).active for _, value in active]
    _, levels = read_levels(bench, text)
    found += [number for level in levels for number in (level.fve, level.ce, level.ce_clean)]
    steering = Steering([LatentEdit(0, 0.4, units="norm")])
    *_, last = lent_stream(bench, text, steering, seed=0, temperature=0.7, max_new_tokens=2)
    found += [loss for loss in last.losses.values() if loss is not None]
    if not all(map(math.isfinite, found)) or not (math.isfinite(norm) and norm > 0):
        raise SpaceError("What comes out are not finite numbers.")
    return norm


def passage(bench: Workbench) -> str:
    """A text that the model has ordinary tokens for."""
    ids = bench.tokenizer(PASSAGE).input_ids
    if sum(token not in bench.special_ids for token in ids) >= NUM_ORDINARY:
        return PASSAGE
    ordinary = (token for token in range(len(bench.tokenizer)) if token not in bench.special_ids)
    return bench.decode([token for token, _ in zip(ordinary, range(NUM_ORDINARY), strict=False)])
