"""What every tab needs of an SAE, tried once when it is opened.

A site may be one that a forward passes and `generate` cuts short (the head), that is of another width, or that holds
something else than a vector for each token; weights may be such that nothing finite comes out. Whatever it is, it is
said when the SAE is opened, rather than in every tab.
"""

import logging
import math

from hf_msae.steering import LatentEdit, Steering
from msae_space.generation import lent_stream
from msae_space.loaded_sae import LoadedSAE, SpaceError, first_line
from msae_space.reading import mean_norm, read, read_levels

logger = logging.getLogger(__name__)

SAMPLE_TEXT = (
    "Once upon a time, there was a kind girl. She lived near the forest with her mother and a small dog. "
    "One day, they went to the river."
)
NUM_ORDINARY = 16


def smoke_test(loaded: LoadedSAE) -> float:
    """Reads a text, measures levels and steers.

    Returns:
        The mean length of the activations at the site.

    Raises:
        SpaceError: Something of it fails, or gives no finite numbers.
    """
    try:
        return _try_all(loaded)
    except Exception as error:  # the SAE and the model are anybody's, and so is what they make of each other
        logger.info("%s failed its smoke test.", loaded.key, exc_info=error)
        config = loaded.sae.config
        raise SpaceError(
            f"This page cannot work with an SAE at {config.site} of {config.base_model}: {first_line(error)}"
        ) from error


def _try_all(loaded: LoadedSAE) -> float:
    text = sample_text(loaded)
    norm = mean_norm(loaded, text)
    found = [value for active in read(loaded, text).active for _, value in active]
    _, levels = read_levels(loaded, text)
    found += [number for level in levels for number in (level.fve, level.ce, level.ce_clean)]
    steering = Steering([LatentEdit(0, 0.4, units="norm")])
    *_, last = lent_stream(loaded, text, steering, seed=0, temperature=0.7, max_new_tokens=2)
    found += [loss for loss in last.losses.values() if loss is not None]
    if not all(map(math.isfinite, found)) or not (math.isfinite(norm) and norm > 0):
        raise SpaceError("What comes out are not finite numbers.")
    return norm


def sample_text(loaded: LoadedSAE) -> str:
    """A text that the model has ordinary tokens for."""
    ids = loaded.tokenizer(SAMPLE_TEXT).input_ids
    if sum(token not in loaded.special_ids for token in ids) >= NUM_ORDINARY:
        return SAMPLE_TEXT
    ordinary = (token for token in range(len(loaded.tokenizer)) if token not in loaded.special_ids)
    return loaded.decode([token for token, _ in zip(ordinary, range(NUM_ORDINARY), strict=False)])
