"""A learner in files, of which one process writes what all have; any number of processes reads them again."""

from pathlib import Path

from safetensors.torch import load_file

from hf_msae.hub.results import save_quietly
from hf_msae.process_wide import no_transformers_bars
from hf_msae.training.checkpoints import read_tensors, write_tensors
from hf_msae.training.learner import Learner
from hf_msae.training.sharded import ShardedSAE, read_latent_file, write_latent_file

# Beside the SAE in a checkpoint: what has a row for each latent, and the rest.
ROWS_NAME = "learner.safetensors"
STATE_NAME = "learner.pt"


def write_model(learner: Learner, folder: Path | None) -> None:
    """Write a learner's SAE as `save_pretrained` does.

    Args:
        learner: Whose it is.
        folder: Where to; None sends what the process that writes needs.
    """
    if isinstance(learner.sae, ShardedSAE):
        with no_transformers_bars():
            learner.sae.write(folder)
    elif folder is not None:
        save_quietly(learner.sae, folder)


def write_state(learner: Learner, folder: Path | None) -> None:
    """Write what only a resumed run needs.

    Args:
        learner: Whose it is.
        folder: Where to; None sends what the process that writes needs.
    """
    path = None if folder is None else folder / ROWS_NAME
    write_latent_file(path, learner.latent_state(), {}, learner.sae.config.num_latents, learner.sae.ranks)
    if folder is not None:
        write_tensors(folder / STATE_NAME, learner.state_dict())


def read_learner(learner: Learner, folder: Path) -> None:
    """Go on from what `write_model` and `write_state` wrote, whatever the number of processes then.

    Args:
        learner: What goes on.
        folder: Where they wrote it.

    Raises:
        CheckpointError: Where it cannot be read.
    """
    sae, rows = learner.sae, learner.rows
    state = read_tensors(folder / STATE_NAME)
    latents = read_latent_file(folder / ROWS_NAME, rows.start, rows.stop, sae.config.num_latents)
    if isinstance(sae, ShardedSAE):
        sae.read(folder)
    else:
        sae.load_state_dict(load_file(folder / "model.safetensors"))
    learner.load_state_dict(state, latents)
