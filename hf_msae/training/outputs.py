"""What a run leaves behind: the SAE, its metrics, log, model card and checkpoints.

One process writes, and all take part: with sharded latents each sends its rows. A full disk is no reason to end a run:
older checkpoints stay, and the next save may find room.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file

from hf_msae.atomic_files import atomic_file
from hf_msae.hub.card import choose_latent, write_model_card
from hf_msae.hub.results import public_arguments
from hf_msae.metrics import Measurement
from hf_msae.modeling import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.modeling.prefix_loading import WEIGHTS_NAME
from hf_msae.training.arguments import SAETrainingArguments
from hf_msae.training.checkpoints import (
    CheckpointError,
    DiskFullError,
    explain_full_disk,
    is_full_disk,
    list_checkpoints,
    remove_old_checkpoints,
    write_checkpoint,
)
from hf_msae.training.collectives import Job, MainProcessWriter
from hf_msae.training.held_out import Evaluator
from hf_msae.training.learner import Learner
from hf_msae.training.learner_files import write_model, write_state
from hf_msae.training.preparation import from_anywhere
from hf_msae.training.run import Run

logger = logging.getLogger(__name__)

LOG_NAME = "training_log.jsonl"
METRICS_NAME = "metrics.json"
ARGUMENTS_NAME = "training_arguments.json"


def check_output_dir(args: SAETrainingArguments) -> None:
    """Refuse an output directory in which another run left its results, unless they are to be deleted or gone on with.

    Args:
        args: The arguments of this run.

    Raises:
        CheckpointError: Where it holds another run, or is a file.
    """
    path = Path(args.output_dir)
    traces = _traces(path)
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"The output directory {path} is a file; give a folder.")
    if traces and not args.overwrite_output_dir and not args.resume_from_checkpoint:
        raise CheckpointError(
            f"{path} holds another run ({', '.join(traces)}). Give --resume-from-checkpoint to go on with it, "
            "--overwrite-output-dir to delete it, or another --output-dir."
        )


def prepare_output_dir(run: Run) -> None:
    """Make the output directory, without what an earlier run left where that is to be deleted."""
    if run.is_main:
        if run.args.overwrite_output_dir and _traces(run.output_dir):
            shutil.rmtree(run.output_dir)
        run.output_dir.mkdir(parents=True, exist_ok=True)
    run.accelerator.wait_for_everyone()


def _traces(path: Path) -> list[str]:
    """What tells that a run was here."""
    files = [name for name in (METRICS_NAME, LOG_NAME, "config.json") if (path / name).exists()]
    return files + [checkpoint.name for checkpoint in list_checkpoints(path)]


class RunLog:
    """Appends to `training_log.jsonl` and to the trackers, on the main process.

    Lines for which the disk has no room are kept, and written once it has.

    Args:
        run: The run.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self._file: BinaryIO | None = None
        self._unwritten = b""

    def open(self) -> None:
        """Begin to log; nothing is written by processes other than the main one."""
        args = self.run.args
        if args.report_to:
            # Trackers send it to other machines.
            public = public_arguments(args.to_dict())
            flat = {name: value for name, value in public.items() if isinstance(value, int | float | str)}
            self.run.accelerator.init_trackers(args.run_name or self.run.output_dir.name, config=flat)
        if self.run.is_main:
            self._file = (self.run.output_dir / LOG_NAME).open("ab", buffering=0)

    def rewind(self, step: int) -> None:
        """Drop the lines of steps after the checkpoint from which the run goes on.

        Args:
            step: Of the checkpoint.
        """
        if self._file is None:
            return
        self._file.close()
        path = self.run.output_dir / LOG_NAME
        lines = [
            line
            for line in path.read_text(encoding="utf-8").splitlines()
            if line.endswith("}") and json.loads(line)["step"] <= step
        ]
        with atomic_file(path) as draft:
            draft.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        self._file = path.open("ab", buffering=0)

    def write(self, name: str, entry: dict[str, Any]) -> None:
        """Write one line, and the same numbers to the trackers.

        Args:
            name: Of the SAE.
            entry: What is said of it; `step` must be among it.
        """
        if self._file is not None:
            self._append(self._file, json.dumps(entry if self.run.single else {"sae": name, **entry}) + "\n")
        prefix = "" if self.run.single else f"{name}/"
        self.run.accelerator.log(dict(_numbers(entry, prefix)), step=entry["step"])

    def _append(self, file: BinaryIO, line: str) -> None:
        end = file.seek(0, os.SEEK_END)
        self._unwritten += line.encode()
        try:
            written = file.write(self._unwritten)
        except OSError as error:
            if not is_full_disk(error):
                raise
            written = 0
        if written == len(self._unwritten):
            self._unwritten = b""
            return
        file.truncate(end)  # no half lines
        logger.warning(
            "The disk of %s is full: %s is written when there is room again.", self.run.output_dir, LOG_NAME
        )

    def close(self) -> None:
        """Close the file and the trackers."""
        if self._file is not None:
            self._file.close()
            self._file = None
        self.run.accelerator.end_training()


def _numbers(entry: dict[str, Any], prefix: str) -> list[tuple[str, float]]:
    """The entry's numbers under flat names; a list gives one per level."""
    flat: list[tuple[str, float]] = []
    for name, value in entry.items():
        if isinstance(value, int | float):
            flat.append((prefix + name, value))
        elif name == "level_losses":
            flat += [(f"{prefix}level_loss/{level}", loss) for level, loss in enumerate(value)]
        elif name == "eval_levels":
            for level in value:
                label = level["prefix"]
                flat += [(f"{prefix}eval/{key}/{label}", v) for key, v in level.items() if isinstance(v, int | float)]
    return flat


def write_results(
    folder: Path,
    save: Callable[[Path], None],
    config: MatryoshkaSAEConfig,
    measurement: Measurement,
    args: SAETrainingArguments,
    extra: dict[str, Any],
) -> None:
    """Write one SAE's folder: every file is made beside its place and then moved there, the configuration last.

    Args:
        folder: The folder.
        save: Writes the SAE itself into a folder.
        config: Its configuration.
        measurement: What was measured.
        args: The arguments of the run.
        extra: What metrics.json says besides.
    """
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / ".results.part"
    shutil.rmtree(draft, ignore_errors=True)
    save(draft)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    metrics = {**measurement.to_dict(), **extra, "versions": versions}
    _write_json(draft / METRICS_NAME, metrics)
    arguments = args.to_dict()
    if args.init_from is not None:
        arguments["init_from"] = from_anywhere(args.init_from)
    _write_json(draft / ARGUMENTS_NAME, arguments)
    with safe_open(draft / "model.safetensors", framework="pt") as weights:
        latent = choose_latent(weights.get_tensor("max_activation"), weights.get_tensor("firing_rate"))
    write_model_card(
        draft / "README.md",
        config,
        measurement,
        extra,
        versions,
        source=str(folder),
        latent=latent,
        arguments=arguments,
    )
    # Without it nobody takes the folder for an SAE while old and new files are mixed.
    (folder / "config.json").unlink(missing_ok=True)
    for path in sorted(draft.iterdir(), key=lambda path: path.name == "config.json"):
        os.replace(path, folder / path.name)
    draft.rmdir()


def _write_json(path: Path, contents: Any) -> None:
    path.write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")


class Saver:
    """Writes the checkpoints and the result of a run; all processes call it at the same time.

    Args:
        run: The run.
        evaluator: Calibrates the SAEs as readers are to find them.
    """

    def __init__(self, run: Run, evaluator: Evaluator) -> None:
        self.run, self.evaluator = run, evaluator

    def save_checkpoint(self, step: int, learners: Sequence[Learner], state: dict[str, Any]) -> Path | None:
        """Write the checkpoint of a step.

        Args:
            step: How many steps were taken.
            learners: What is written.
            state: The trainer's state, JSON-able.

        Returns:
            The checkpoint's folder; None where the disk is full.
        """
        with self.evaluator.calibrated(learners, step):
            pass  # all processes find the thresholds together; writing then needs no other process for them
        path: Path | None = None
        with self._writer(step, learners) as writer:
            if self.run.is_main:
                path = self._write_checkpoint(step, learners, state, writer)
        return self.run.on_main(lambda: path)

    def _write_checkpoint(
        self, step: int, learners: Sequence[Learner], state: dict[str, Any], writer: MainProcessWriter
    ) -> Path | None:
        def write(draft: Path) -> None:
            for learner in learners:
                folder = self.run.sae_folder(draft, learner.name)
                folder.mkdir(parents=True, exist_ok=True)
                writer.write((learner.name, "model"), folder)
                writer.write((learner.name, "state"), folder)

        try:
            path = write_checkpoint(self.run.output_dir, step, write, state)
        except DiskFullError as error:
            logger.warning("%s The run goes on, and the next checkpoint is tried at its time.", error)
            return None
        remove_old_checkpoints(self.run.output_dir, self.run.args.save_total_limit)
        return path

    def save_results(
        self,
        step: int,
        learners: Sequence[Learner],
        measurements: Mapping[str, Measurement],
        facts: Mapping[str, dict[str, Any]],
    ) -> None:
        """Write what the run leaves behind: each SAE's folder, and for a grid all numbers in one `metrics.json`.

        Args:
            step: How many steps were taken.
            learners: What is written.
            measurements: What was measured, by the SAEs' names.
            facts: What metrics.json and the card say of the run besides, by the SAEs' names.

        Raises:
            DiskFullError: Where there is no room for it.
        """
        with self._writer(step, learners) as writer:
            if self.run.is_main:
                for learner in learners:
                    name = learner.name
                    with explain_full_disk(self.run.output_dir, "the result"):
                        write_results(
                            self.run.sae_folder(self.run.output_dir, name),
                            partial(writer.write, (name, "model")),
                            learner.sae.config,
                            measurements[name],
                            self.run.args,
                            facts[name],
                        )
                if not self.run.single:
                    index = {name: measurement.to_dict() for name, measurement in measurements.items()}
                    _write_json(self.run.output_dir / METRICS_NAME, index)
        self.run.accelerator.wait_for_everyone()

    def hand_over(
        self, step: int, learners: Sequence[Learner], given: Mapping[str, MatryoshkaSAE], base: Path
    ) -> None:
        """Leave each SAE that the trainer was given as a reader finds it, now that nobody trains on.

        Args:
            step: How many steps were taken.
            learners: What was trained.
            given: The SAEs by name.
            base: The folder under which they were saved.
        """
        for learner in learners:
            self.evaluator.calibrate(learner, step)
            learner.finish()
            sae = given[learner.name]
            if sae is not learner.sae:  # each process trained some of the latents
                sae.load_state_dict(load_file(self.run.sae_folder(base, learner.name) / WEIGHTS_NAME))
                sae.eval()

    def _writer(self, step: int, learners: Sequence[Learner]) -> MainProcessWriter:
        """For each learner the job of writing its model, as a reader gets it, and that of writing its state."""
        jobs: dict[tuple[str, str], Job] = {}
        for learner in learners:
            jobs[learner.name, "model"] = partial(self._write_model, learner, step)
            jobs[learner.name, "state"] = partial(write_state, learner)
        return MainProcessWriter(learners[0].sae.ranks, jobs)

    def _write_model(self, learner: Learner, step: int, folder: Path | None) -> None:
        with self.evaluator.calibrated([learner], step):
            write_model(learner, folder)
