"""Saving the SAEs of a run: where each lies, who writes what, and what a full disk means.

One process writes, and all take part: with sharded latents each sends its rows. A full disk is no reason to end a run:
older checkpoints stay, and the next save may find room.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors.torch import load_file

from hf_msae.modeling import MatryoshkaSAE
from hf_msae.training.arguments import SAETrainingArguments
from hf_msae.training.checkpoints import DiskFullError, remove_old_checkpoints, write_checkpoint
from hf_msae.training.collectives import OneWriter
from hf_msae.training.learner import Learner
from hf_msae.training.measuring import Examiner
from hf_msae.training.resuming import on_main
from hf_msae.training.sharded import WEIGHTS_NAME

logger = logging.getLogger(__name__)


class Saver:
    """Writes the checkpoints of one run; `single` where it trains one SAE only."""

    def __init__(
        self, output_dir: Path, args: SAETrainingArguments, accelerator: Accelerator, examiner: Examiner, single: bool
    ) -> None:
        self.output_dir, self.args, self.accelerator = output_dir, args, accelerator
        self.examiner, self.single = examiner, single

    def folder(self, base: Path, name: str) -> Path:
        """Where one SAE's files lie under a folder: in it when it is the only one, else in a folder of its name."""
        return base if self.single else base / name

    def save(self, step: int, learners: Sequence[Learner], state: dict[str, Any]) -> Path | None:
        """The checkpoint of a step, written by the main process while all call this; None where the disk is full."""
        with self.examiner.calibrated(learners, step):
            pass  # all processes find the thresholds together; writing then needs no other process for them
        path: Path | None = None
        with self.one_writer(step, learners) as writer:
            if self.accelerator.is_main_process:
                path = self._write(step, learners, state, writer)
        return on_main(self.accelerator, lambda: path)

    def hand_over(
        self, step: int, learners: Sequence[Learner], given: Mapping[str, MatryoshkaSAE], base: Path
    ) -> None:
        """End of training: leave each SAE that was given as a reader finds it under `base`, where it was saved."""
        for learner in learners:
            self.examiner.settle(learner, step)
            learner.finish()
            sae = given[learner.name]
            if sae is not learner.sae:  # each process trained some of the latents
                sae.load_state_dict(load_file(self.folder(base, learner.name) / WEIGHTS_NAME))
                sae.eval()

    def _write(self, step: int, learners: Sequence[Learner], state: dict[str, Any], writer: OneWriter) -> Path | None:
        def write(draft: Path) -> None:
            for number, learner in enumerate(learners):
                folder = self.folder(draft, learner.name)
                folder.mkdir(parents=True, exist_ok=True)
                writer.run(2 * number, folder)
                writer.run(2 * number + 1, folder)

        try:
            path = write_checkpoint(self.output_dir, step, write, state)
        except DiskFullError as error:
            logger.warning("%s The run goes on, and the next checkpoint is tried at its time.", error)
            return None
        remove_old_checkpoints(self.output_dir, self.args.save_total_limit)
        return path

    def one_writer(self, step: int, learners: Sequence[Learner]) -> OneWriter:
        """For each learner the job of writing its model, as a reader gets it, and that of writing its state."""
        jobs: list[Callable[[Path | None], None]] = []
        for learner in learners:
            jobs += [partial(self._write_model, learner, step), learner.write_state]
        return OneWriter(learners[0].sae.ranks, jobs)

    def _write_model(self, learner: Learner, step: int, folder: Path | None) -> None:
        with self.examiner.calibrated([learner], step):
            learner.write_model(folder)
