"""What a run leaves behind: the SAE, `metrics.json`, `training_log.jsonl`, the model card."""

import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import torch
import transformers
from accelerate import Accelerator
from safetensors import safe_open

from hf_msae.atomic_files import atomic_file
from hf_msae.hub.card import choose_latent, write_model_card
from hf_msae.hub.results import public_arguments
from hf_msae.metrics import Measurement
from hf_msae.modeling import MatryoshkaSAEConfig
from hf_msae.training.arguments import SAETrainingArguments
from hf_msae.training.checkpoints import CheckpointError, is_full_disk, list_checkpoints
from hf_msae.training.preparation import from_anywhere

logger = logging.getLogger(__name__)

LOG_NAME = "training_log.jsonl"
METRICS_NAME = "metrics.json"
ARGUMENTS_NAME = "training_arguments.json"


def check_output_dir(path: Path, args: SAETrainingArguments) -> None:
    """Refuse an output directory in which another run left its results, unless they are to be deleted."""
    traces = _traces(path)
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"The output directory {path} is a file; give a folder.")
    if traces and not args.overwrite_output_dir and not args.resume_from_checkpoint:
        raise CheckpointError(
            f"{path} holds another run ({', '.join(traces)}). Give --resume-from-checkpoint to go on with it, "
            "--overwrite-output-dir to delete it, or another --output-dir."
        )


def prepare_output_dir(path: Path, args: SAETrainingArguments, accelerator: Accelerator) -> None:
    """Make the output directory, without what an earlier run left where that is to be deleted."""
    if accelerator.is_main_process:
        if args.overwrite_output_dir and _traces(path):
            shutil.rmtree(path)
        path.mkdir(parents=True, exist_ok=True)
    accelerator.wait_for_everyone()


def _traces(path: Path) -> list[str]:
    """What tells that a run was here."""
    files = [name for name in (METRICS_NAME, LOG_NAME, "config.json") if (path / name).exists()]
    return files + [checkpoint.name for checkpoint in list_checkpoints(path)]


class RunLog:
    """Appends to `training_log.jsonl` and to the trackers, on the main process.

    Lines for which the disk has no room are kept, and written once it has.
    """

    def __init__(self, output_dir: Path, accelerator: Accelerator, single: bool) -> None:
        self.output_dir, self.accelerator, self.single = output_dir, accelerator, single
        self._file: BinaryIO | None = None
        self._unwritten = b""

    def open(self, args: SAETrainingArguments) -> None:
        """Begin to log; nothing is written by processes other than the main one."""
        if args.report_to:
            # Trackers send it to other machines.
            public = public_arguments(args.to_dict())
            flat = {name: value for name, value in public.items() if isinstance(value, int | float | str)}
            self.accelerator.init_trackers(args.run_name or self.output_dir.name, config=flat)
        if self.accelerator.is_main_process:
            self._file = (self.output_dir / LOG_NAME).open("ab", buffering=0)

    def rewind(self, step: int) -> None:
        """Drop the lines of steps after the checkpoint from which the run goes on."""
        if self._file is None:
            return
        self._file.close()
        path = self.output_dir / LOG_NAME
        lines = [
            line for line in path.read_text().splitlines() if line.endswith("}") and json.loads(line)["step"] <= step
        ]
        with atomic_file(path) as draft:
            draft.write_text("".join(line + "\n" for line in lines))
        self._file = path.open("ab", buffering=0)

    def write(self, name: str, entry: dict[str, Any]) -> None:
        """One line, and the same numbers to the trackers."""
        if self._file is not None:
            self._append(self._file, json.dumps(entry if self.single else {"sae": name, **entry}) + "\n")
        prefix = "" if self.single else f"{name}/"
        self.accelerator.log(dict(_numbers(entry, prefix)), step=entry["step"])

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
        logger.warning("The disk of %s is full: %s is written when there is room again.", self.output_dir, LOG_NAME)

    def write_index(self, measurements: dict[str, Any]) -> None:
        """For a grid, all SAEs' numbers in one `metrics.json`."""
        if not self.single:
            _write_json(self.output_dir / METRICS_NAME, measurements)

    def close(self) -> None:
        """Close the file and the trackers."""
        if self._file is not None:
            self._file.close()
            self._file = None
        self.accelerator.end_training()


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

    `save` writes the SAE itself into a folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / ".results.part"
    shutil.rmtree(draft, ignore_errors=True)
    save(draft)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    metrics = {**asdict(measurement), **extra, "versions": versions}
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
    path.write_text(json.dumps(contents, indent=2) + "\n")
