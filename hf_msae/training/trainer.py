"""The training loop: one pass of a language model feeds one or many SAEs.

The loop is plain: take a batch of activations, give it to every learner, now and then log, measure and save. What is
hard lives elsewhere: checks before the run in `preparation`, resumable data in `feeds`, one SAE's step in `learner`,
held-out numbers in `measuring`, whole-or-absent folders in `checkpoints`, what the run leaves behind in `results`.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, tqdm
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState

from hf_msae.data import ActivationError
from hf_msae.metrics import Measurement
from hf_msae.modeling import MatryoshkaSAE
from hf_msae.training.arguments import SAETrainingArguments
from hf_msae.training.checkpoints import (
    CheckpointError,
    explain_full_disk,
    find_checkpoint,
    list_checkpoints,
    read_state,
    read_tensors,
    remove_old_checkpoints,
    write_checkpoint,
)
from hf_msae.training.interrupts import InterruptFlag
from hf_msae.training.learner import Learner
from hf_msae.training.measuring import Examiner
from hf_msae.training.preparation import count_steps, named_saes, open_data, resolve_sites
from hf_msae.training.results import RunLog, prepare_output_dir, save_quietly, write_results

# Arguments that may differ between a checkpoint's run and the run that resumes it: none of them changes a weight.
FREE_ARGUMENTS = frozenset(
    {
        "output_dir",
        "overwrite_output_dir",
        "resume_from_checkpoint",
        "eval_steps",
        "logging_steps",
        "save_steps",
        "save_total_limit",
        "report_to",
        "run_name",
        "disable_tqdm",
        "use_cpu",
    }
)


class TrainingDiverged(RuntimeError):
    """Activations or a loss became NaN or infinite."""


class TrainingInterrupted(RuntimeError):
    """The run was told to stop, and has saved a checkpoint."""


class SAETrainer:
    """Trains one or several SAEs on a language model's activations.

    Args:
        model: the language model; may be None when training from an activation cache. Put into eval mode, never
            changed.
        sae: the SAE to train, or several (a list, or a mapping from names), each with `config.site` set. All are
            trained from one pass of the model. Weights are initialised anew.
        args: how to train.
        train_dataset: documents (`datasets.Dataset`, `IterableDataset`, a sequence of texts or chats, `Documents`), or
            `CachedActivations`.
        eval_dataset: documents to measure on; by default the first ones of `train_dataset` are held out.
        processing_class: the model's tokenizer.
        callbacks: `transformers.TrainerCallback`s; they see the first SAE as `model`.

    Raises at once, before any long work: `SiteError` for a site that does not exist, `DatasetError` for data that
    cannot be used, `ValueError` for sizes that do not fit, `CheckpointError` for an output directory that holds
    another run.
    """

    def __init__(
        self,
        model: PreTrainedModel | None,
        sae: MatryoshkaSAE | Sequence[MatryoshkaSAE] | Mapping[str, MatryoshkaSAE],
        args: SAETrainingArguments,
        train_dataset: Any,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        self.model, self.args, self.tokenizer = model, args, processing_class
        self.output_dir = Path(args.output_dir)
        self.accelerator = Accelerator(
            cpu=args.on_cpu, log_with=args.report_to or None, project_dir=str(self.output_dir / "trackers")
        )
        self.saes = named_saes(sae)
        prepare_output_dir(self.output_dir, args, self.accelerator)
        self.sites = resolve_sites(model, self.saes)
        held_out, self.feed = open_data(
            model,
            processing_class,
            self.saes,
            list(dict.fromkeys(self.sites.values())),
            args,
            train_dataset,
            eval_dataset,
            self.accelerator.process_index,
            self.accelerator.num_processes,
        )
        self.examiner = Examiner(model, held_out, args)
        self.state = TrainerState(
            is_local_process_zero=self.accelerator.is_local_main_process,
            is_world_process_zero=self.accelerator.is_main_process,
        )
        self.control = TrainerControl()
        self.callbacks = list(callbacks)
        self.log = RunLog(self.output_dir, self.accelerator, single=len(self.saes) == 1)
        self.learners: list[Learner] = []
        self._training_seconds = 0.0
        self._first_step = 0

    def _count_steps(self) -> int:
        return count_steps(self.args, self.feed, self.accelerator.num_processes)

    def _make_learners(self, max_steps: int) -> list[Learner]:
        return [
            Learner(name, sae.to(self.accelerator.device), self.sites[name], self.args, max_steps, self.accelerator)
            for name, sae in self.saes.items()
        ]

    # The loop

    def train(self) -> dict[str, Measurement]:
        """Train to the end, measure on held-out data, save everything; returns each SAE's measurement.

        Raises `TrainingInterrupted` after Ctrl-C or SIGTERM, with a checkpoint saved, and `TrainingDiverged` when
        activations or a loss are not finite.
        """
        checkpoint = None
        if self.args.resume_from_checkpoint:
            checkpoint = find_checkpoint(self.args.resume_from_checkpoint, self.output_dir)
        max_steps = read_state(checkpoint)["max_steps"] if checkpoint else self._count_steps()
        self.state.max_steps = max_steps
        self.learners = self._make_learners(max_steps)
        self.log.open(self.args)
        if checkpoint is not None:
            self._load_checkpoint(checkpoint)
        self._call("on_train_begin")
        with InterruptFlag() as interrupt:
            self._run(interrupt)
        return self._finish()

    def _run(self, interrupt: InterruptFlag) -> None:
        progress = tqdm(
            total=self.state.max_steps,
            initial=self.state.global_step,
            desc="Training",
            unit="step",
            disable=self.args.disable_tqdm,
        )
        with progress:
            while self.state.global_step < self.state.max_steps and not self.control.should_training_stop:
                began = time.perf_counter()
                self._step()
                self._training_seconds += time.perf_counter() - began
                self._housekeeping(progress)
                if self._should_stop(interrupt):
                    self._stop(interrupt)

    def _step(self) -> None:
        step = self.state.global_step
        self._call("on_step_begin")
        try:
            batch = next(self.feed)
        except ActivationError as error:
            raise TrainingDiverged(f"{error} The run stopped before step {step}. {self._last_checkpoint()}") from error
        for learner in self.learners:
            if step == 0:
                learner.start(batch[learner.site])
            learner.step(batch[learner.site], step)
        self.state.global_step = step + 1
        self.state.num_input_tokens_seen += self.args.per_device_train_batch_size * self.accelerator.num_processes
        self._call("on_step_end")

    def _housekeeping(self, progress: tqdm) -> None:
        step, last = self.state.global_step, self.state.global_step == self.state.max_steps
        progress.update()
        if step % self.args.logging_steps == 0 or last or self.control.should_log:
            self._write_log(progress)
        if (self.args.eval_steps and step % self.args.eval_steps == 0 and not last) or self.control.should_evaluate:
            self._measure_in_passing()
        if (self.args.save_steps and (step % self.args.save_steps == 0 or last)) or self.control.should_save:
            self._save_checkpoint()
        self.control.should_log = self.control.should_evaluate = self.control.should_save = False

    def _write_log(self, progress: tqdm) -> None:
        self._check_finite()
        speed = self._tokens_per_second()
        for learner in self.learners:
            values = learner.read_log()
            values["learning_rate"] = learner.optimizer.param_groups[0]["lr"] if learner.optimizer else 0.0
            entry = self._entry(values)
            self.log.write(learner.name, {**entry, "tokens_per_second": speed})
            self._remember(learner.name, entry)
            if learner is self.learners[0]:
                shown = {"loss": f"{values['loss']:.4f}", "L0": f"{values['l0']:.1f}", "dead": f"{values['dead']:.1%}"}
                progress.set_postfix({"tokens/s": f"{speed:,.0f}", **shown})
        self._call("on_log", logs=self.state.log_history[-1])

    def _entry(self, values: dict[str, Any]) -> dict[str, Any]:
        return {"step": self.state.global_step, "tokens": self.state.num_input_tokens_seen, **values}

    def _remember(self, name: str, entry: dict[str, Any]) -> None:
        history: list[Any] = self.state.log_history  # typed in transformers as if it held numbers only
        history.append({"name": name, **entry})

    def _tokens_per_second(self) -> float:
        steps = self.state.global_step - self._first_step
        tokens = steps * self.args.per_device_train_batch_size * self.accelerator.num_processes
        return tokens / max(self._training_seconds, 1e-9)

    def _check_finite(self) -> None:
        for learner in self.learners:
            step = int(learner.bad_step)
            if step >= 0:
                raise TrainingDiverged(
                    f"The loss of {learner.name} was NaN or infinite at step {step}. {self._last_checkpoint()} Try a "
                    f"lower "
                    f"learning rate than {learner.learning_rate:g}, or a longer warm-up."
                )

    def _last_checkpoint(self) -> str:
        checkpoints = list_checkpoints(self.output_dir)
        return f"The last good checkpoint is {checkpoints[-1]}." if checkpoints else "There is no checkpoint yet."

    def _call(self, event: str, **details: Any) -> None:
        """Tell the callbacks; what they return replaces the control, as in `transformers.Trainer`."""
        first = self.learners[0].sae if self.learners else None
        for callback in self.callbacks:
            handler = getattr(callback, event)
            result = handler(
                self.args, self.state, self.control, model=first, processing_class=self.tokenizer, **details
            )
            self.control = result if result is not None else self.control

    # Stopping early

    def _should_stop(self, interrupt: InterruptFlag) -> bool:
        if self.accelerator.num_processes == 1:
            return interrupt.signal_name is not None
        if self.state.global_step % 10:
            return False
        # A signal reaches the processes at different steps; they must agree on the one at which all of them stop.
        flag = torch.tensor(float(interrupt.signal_name is not None), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum") > 0)

    def _stop(self, interrupt: InterruptFlag) -> None:
        self._save_checkpoint()
        where = self.output_dir / f"checkpoint-{self.state.global_step}"
        self.log.close()
        raise TrainingInterrupted(
            f"Stopped by {interrupt.signal_name or 'another process'} after step {self.state.global_step} of "
            f"{self.state.max_steps}; saved {where}. To go on, give the same command with --resume-from-checkpoint."
        )

    # Checkpoints

    def folder(self, base: Path, name: str) -> Path:
        """Where one SAE's files lie under a folder: in it when it is the only one, else in a folder of its name."""
        return base if len(self.saes) == 1 else base / name

    def _save_checkpoint(self) -> None:
        self._check_finite()
        feeds = gather_object([self.feed.state_dict()])
        if self.accelerator.is_main_process:
            state = {
                "step": self.state.global_step,
                "max_steps": self.state.max_steps,
                "tokens": self.state.num_input_tokens_seen,
                "arguments": self.args.to_dict(),
                "feeds": feeds,
            }
            write_checkpoint(self.output_dir, self.state.global_step, self._write_learners, state)
            remove_old_checkpoints(self.output_dir, self.args.save_total_limit)
        self.accelerator.wait_for_everyone()
        self._call("on_save")

    def _write_learners(self, draft: Path) -> None:
        for learner in self.learners:
            folder = self.folder(draft, learner.name)
            with self.examiner.calibrated(learner, self.state.global_step):
                save_quietly(learner.sae, folder)
            torch.save(
                {"learner": learner.state_dict(), "threshold": learner.sae.threshold.data}, folder / "learner.pt"
            )

    def _load_checkpoint(self, checkpoint: Path) -> None:
        state = read_state(checkpoint)
        self._check_same_run(checkpoint, state)
        for learner in self.learners:
            folder = self.folder(checkpoint, learner.name)
            saved = read_tensors(folder / "learner.pt")
            weights = load_file(folder / "model.safetensors")
            learner.load_state_dict(saved["learner"], {**weights, "threshold": saved["threshold"]})
        self.feed.load_state_dict(state["feeds"][self.accelerator.process_index])
        self.state.global_step = self._first_step = state["step"]
        self.state.num_input_tokens_seen = state["tokens"]
        self.log.rewind(state["step"])

    def _check_same_run(self, checkpoint: Path, state: Mapping[str, Any]) -> None:
        now = self.args.to_dict()
        changed = [
            f"{name}: {value!r} then, {now.get(name)!r} now"
            for name, value in state["arguments"].items()
            if name not in FREE_ARGUMENTS and value != now.get(name)
        ]
        if len(state["feeds"]) != self.accelerator.num_processes:
            changed.append(f"processes: {len(state['feeds'])} then, {self.accelerator.num_processes} now")
        for name, sae in self.saes.items():
            config = type(sae.config).from_pretrained(self.folder(checkpoint, name))
            ours, theirs = sae.config.to_diff_dict(), config.to_diff_dict()
            for key in sorted(
                (ours.keys() | theirs.keys()) - {"architectures", "auto_map", "dtype", "transformers_version"}
            ):
                if ours.get(key) != theirs.get(key):
                    changed.append(f"{key} of {name}: {theirs.get(key)!r} then, {ours.get(key)!r} now")
        if changed:
            raise CheckpointError(
                f"{checkpoint} belongs to another run ({'; '.join(changed)}). Resume with the arguments of that run, "
                f"or "
                "start anew in another output directory."
            )

    # Measuring

    def evaluate(self) -> dict[str, Measurement]:
        """Measure every SAE as it is now on the held-out tokens, with calibrated thresholds, and record what only
        measuring can tell in it: per-latent firing rates and maxima, L0 and FVE per prefix."""
        measurements = {}
        for learner in self.learners:
            with self.examiner.calibrated(learner, self.state.global_step):
                measurements[learner.name] = self.examiner.measure(learner)
        return measurements

    def _measure_in_passing(self) -> None:
        if self.accelerator.is_main_process:
            for name, measurement in self.evaluate().items():
                levels = [asdict(level) for level in measurement.levels]
                entry = self._entry({"eval_levels": levels})
                self.log.write(name, entry)
                self._remember(name, entry)
        self.accelerator.wait_for_everyone()
        self._call("on_evaluate", metrics={})

    # The end

    def _finish(self) -> dict[str, Measurement]:
        measurements: dict[str, Measurement] = {}
        if self.accelerator.is_main_process:
            for learner in self.learners:
                with self.examiner.calibrated(learner, self.state.global_step):
                    measurements[learner.name] = self.examiner.measure(learner)
                    extra = {
                        "steps": self.state.global_step,
                        "training_tokens": self.state.num_input_tokens_seen,
                        "tokens_per_second": round(self._tokens_per_second(), 1),
                        "training_seconds": round(self._training_seconds, 1),
                        "dataset": self.feed.description,
                        "learning_rate": learner.learning_rate,
                    }
                    folder = self.folder(self.output_dir, learner.name)
                    with explain_full_disk(self.output_dir, "the result"):
                        write_results(folder, learner.sae.eval(), measurements[learner.name], self.args, extra)
            self.log.write_index({name: asdict(measurement) for name, measurement in measurements.items()})
        self.accelerator.wait_for_everyone()
        for learner in self.learners:
            learner.finish()
        self._call("on_train_end")
        self.log.close()
        return measurements
