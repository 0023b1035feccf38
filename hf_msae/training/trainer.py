"""The training loop: one pass of a language model feeds one or many SAEs.

The loop is plain: take a batch of activations, give it to every learner, now and then log, measure and save. What is
hard lives elsewhere: the SAEs before their first step in `preparation`, what a run needs in `plan`, resumable data in
`loaders`, one SAE's step in `learner`, held-out numbers in `held_out`, whole-or-absent folders in `checkpoints`, where
a run goes on in `resuming`, what it leaves behind, on the Hub too, in `outputs`.
"""

import logging
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState

from hf_msae.data import ActivationError, DatasetError, fingerprint
from hf_msae.data.cache import TrainingData
from hf_msae.data.documents import DocumentsLike
from hf_msae.data.populations import describe_difference
from hf_msae.devices import move_language_model
from hf_msae.errors import HfMsaeError, InputError
from hf_msae.metrics import Measurement
from hf_msae.modeling import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.training.arguments import SAETrainingArguments
from hf_msae.training.checkpoints import CheckpointError, list_checkpoints
from hf_msae.training.end_to_end import make_end_to_end
from hf_msae.training.held_out import Evaluator
from hf_msae.training.learner import Learner, make_learners
from hf_msae.training.learner_files import read_learner
from hf_msae.training.outputs import RunLog, Saver, check_output_dir, prepare_output_dir
from hf_msae.training.plan import Plan, Probe, make_plan, probe
from hf_msae.training.preparation import (
    named_saes,
    open_data,
    prepare_lookups,
    resolve_output_sites,
    resolve_sites,
    set_norm_limits,
)
from hf_msae.training.pushing import Pusher
from hf_msae.training.resuming import (
    Checkpoint,
    check_same_data,
    check_same_run,
    choose_checkpoint,
    resume_loader,
    resumed_length,
)
from hf_msae.training.run import InterruptFlag, Run, TrainingInterrupted
from hf_msae.training.schedules import Length
from hf_msae.training.step_graphs import check_graphs
from hf_msae.training.training_bar import TrainingBar
from hf_msae.training.warm_start import warm_start

logger = logging.getLogger(__name__)

# How many of the documents that could not be read are named in metrics.json.
MAX_SKIPPED_NAMED = 1000
# Entries of the log that callbacks find in `state.log_history`.
KEPT_ENTRIES = 1000


class TrainingDiverged(HfMsaeError, RuntimeError):
    """Activations or a loss became NaN or infinite."""

    exit_code = 1


class SAETrainer:
    """Trains one or several SAEs on a language model's activations.

    Args:
        model: The language model; may be None when training from an activation cache. It is moved to
            the run's device, unless it is split over several, and never changed.
        sae: The SAE to train, or several (a list, or a mapping from names), each with `config.site` set. All are
            trained from one pass of the model. Weights are initialised anew, or from `args.init_from`.
        args: How to train.
        train_dataset: Documents (`datasets.Dataset`, `IterableDataset`, a sequence of texts or chats, `Documents`), or
            `CachedActivations`.
        eval_dataset: Documents to measure on; by default some of `train_dataset`, by a hash of each, are held out.
        processing_class: The model's tokenizer.
        callbacks: `transformers.TrainerCallback`s; they see the first SAE as `model`, in `on_save`, `on_evaluate` and
            `on_train_end` as it was saved and measured, else as it is being trained.

    Attributes:
        run: What all parts of the run share: arguments, processes, output directory.
        saes: The SAEs by name.
        sites: Their sites by name.
        output_sites: Where what they reconstruct comes from: the same, but for transcoders.
        state: `transformers.TrainerState`: steps, tokens (`num_input_tokens_seen`), the latest entries of the log.

    Raises:
        SiteError: At once, before any long work, for a site that does not exist.
        DatasetError: For data that cannot be used.
        WarmStartError: For an `init_from` that does not fit.
        InputError: For sizes that do not fit, or a tracker that is not installed.
    """

    def __init__(
        self,
        model: PreTrainedModel | None,
        sae: MatryoshkaSAE | Sequence[MatryoshkaSAE] | Mapping[str, MatryoshkaSAE],
        args: SAETrainingArguments,
        train_dataset: TrainingData,
        eval_dataset: "DocumentsLike | None" = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        self.model, self.tokenizer = model, processing_class
        self.saes = named_saes(sae)
        self.run = run = Run(args, single=len(self.saes) == 1)
        check_graphs(run, self.saes)
        if model is not None:
            move_language_model(model, run.device)
        self.sites = resolve_sites(model, self.saes)
        self.output_sites = resolve_output_sites(model, self.saes, self.sites)
        if run.args.init_from is not None:
            for item in self.saes.values():
                warm_start(item, run.args.init_from, run.args.seed)
        tokens = prepare_lookups(model, processing_class, self.saes, train_dataset)
        sites = list(dict.fromkeys([*self.sites.values(), *self.output_sites.values(), *tokens]))
        held_out, self.loader = open_data(run, model, processing_class, self.saes, sites, train_dataset, eval_dataset)
        self.end_to_end = make_end_to_end(run, model, self.loader)
        self.evaluator = Evaluator(model, held_out, args.disable_tqdm)
        self.saver = Saver(run, self.evaluator)
        self.log = RunLog(run)
        self.pusher: Pusher | None = None
        self.learners: list[Learner] = []
        self.callbacks, self.control = list(callbacks), TrainerControl()
        self.state = TrainerState(
            is_local_process_zero=run.accelerator.is_local_main_process, is_world_process_zero=run.is_main
        )
        self._eval_dataset = eval_dataset
        self._data: dict[str, Any] = {}
        self._length = Length(0)
        self._training_seconds = 0.0
        self._first_step = 0
        self._saved_step = 0

    @property
    def args(self) -> SAETrainingArguments:
        """How to train; with what `accelerate launch` asked for."""
        return self.run.args

    @property
    def accelerator(self) -> Accelerator:
        """The process's `accelerate.Accelerator`."""
        return self.run.accelerator

    def plan(self) -> Plan:
        """What the run needs in memory and on disk, and how long it is; nothing of it is made yet.

        Returns:
            The plan.

        Raises:
            InputError: Where there are fewer tokens than one step takes.
        """
        steps = self.state.max_steps or self.loader.count_steps()
        sites = (self.sites, self.output_sites)
        return make_plan(self.run, self.model, self.saes, sites, self.loader, steps)

    def probe(self) -> Probe:
        """Time a few passes and steps; the trainer can train nothing afterwards.

        Returns:
            Tokens per second.
        """
        length = Length(self.loader.count_steps())
        learners = make_learners(self.run, self.saes, self.sites, length, self.output_sites)
        return probe(self.run, learners, self.evaluator.held_out)

    # The loop

    def train(self, resume_from_checkpoint: str | Path | bool | None = None) -> dict[str, Measurement]:
        """Train to the end, measure on held-out data, and save everything.

        The SAEs that the trainer was given are then what was measured and saved.

        Args:
            resume_from_checkpoint: As in the arguments, over which it takes precedence.

        Returns:
            Each SAE's measurement, by name.

        Raises:
            CheckpointError: For an output directory that holds another run, or a checkpoint that cannot be used.
            TrainingInterrupted: After Ctrl-C or SIGTERM, with a checkpoint saved.
            TrainingDiverged: When activations or a loss are not finite.
        """
        run = self.run
        if resume_from_checkpoint is not None:
            run.args = replace(run.args, resume_from_checkpoint=str(resume_from_checkpoint))
        run.on_main(lambda: check_output_dir(run.args))
        self._data = run.on_main(self._fingerprints)
        checkpoint = choose_checkpoint(run)
        if checkpoint is None:
            self._length = Length(self.loader.count_steps())
        else:
            run.keep_precision(checkpoint.state["arguments"])
            self._length = resumed_length(checkpoint.state, run.args, self.loader.count_steps)
        self.state.max_steps = self._length.max_steps
        if run.args.push_to_hub:
            self.pusher = Pusher(run)
        self.plan().warn()
        prepare_output_dir(run)
        resumed, held_out = self._configs_in(checkpoint), self.evaluator.held_out
        set_norm_limits(run, self.saes, self.sites, self.loader, held_out, resumed, self.output_sites)
        places = (self.sites, self._length, self.output_sites)
        self.learners = make_learners(run, self.saes, *places, self.end_to_end)
        self.log.open()
        if checkpoint is not None:
            self._load_checkpoint(checkpoint)
        self._call("on_train_begin")
        with InterruptFlag(run) as interrupt:
            self._train_steps(interrupt)
        return self._finish()

    def _train_steps(self, interrupt: InterruptFlag) -> None:
        with TrainingBar(self.state.global_step, self.state.max_steps, self.run.args.disable_tqdm) as bar:
            self.loader.on_read = bar.reading
            while self.state.global_step < self.state.max_steps and not self.control.should_training_stop:
                began = time.perf_counter()
                try:
                    self._step()
                except DatasetError:
                    self._save_what_there_is()
                    raise
                self._training_seconds += time.perf_counter() - began
                self._housekeeping(bar)
                signal_number = interrupt.agreed()
                if signal_number is not None:
                    self._stop(signal_number)

    def _step(self) -> None:
        step = self.state.global_step
        self._call("on_step_begin")
        try:
            batch = next(self.loader)
        except ActivationError as error:
            raise TrainingDiverged(f"{error} The run stopped before step {step}. {self._last_checkpoint()}") from error
        for learner in self.learners:
            learner.take(batch, step)
        self.state.global_step = step + 1
        self.state.num_input_tokens_seen += self.run.tokens_per_step
        self._call("on_step_end")

    def _housekeeping(self, bar: TrainingBar) -> None:
        step, last = self.state.global_step, self.state.global_step == self.state.max_steps
        bar.step()
        if step % self.args.logging_steps == 0 or last or self.control.should_log:
            self._write_log(bar)
        if (self.args.eval_steps and step % self.args.eval_steps == 0 and not last) or self.control.should_evaluate:
            self._measure_in_passing()
        if (self.args.save_steps and (step % self.args.save_steps == 0 or last)) or self.control.should_save:
            self._save_checkpoint()
        self.control.should_log = self.control.should_evaluate = self.control.should_save = False

    def _write_log(self, bar: TrainingBar) -> None:
        self._check_finite()
        speed = self._tokens_per_second()
        for learner in self.learners:
            values = learner.read_log()
            values["learning_rate"] = learner.rate
            entry = self._entry(values)
            self.log.write(learner.name, {**entry, "tokens_per_second": speed})
            self._remember(learner.name, entry)
            if learner is self.learners[0]:
                bar.log(values, speed)
        self._call("on_log", logs=self.state.log_history[-1])

    def _entry(self, values: dict[str, Any]) -> dict[str, Any]:
        return {"step": self.state.global_step, "tokens": self.state.num_input_tokens_seen, **values}

    def _remember(self, name: str, entry: dict[str, Any]) -> None:
        """For callbacks; what is older than the latest entries is in the file of the log alone."""
        history: list[Any] = self.state.log_history  # typed in transformers as if it held numbers only
        history.append({"name": name, **entry})
        del history[:-KEPT_ENTRIES]

    def _tokens_per_second(self) -> float:
        steps = self.state.global_step - self._first_step
        return steps * self.run.tokens_per_step / max(self._training_seconds, 1e-9)

    def _check_finite(self) -> None:
        for learner in self.learners:
            step = int(learner.bad_step)
            if step >= 0:
                raise TrainingDiverged(
                    f"The loss of {learner.name} was NaN or infinite at step {step}. {self._last_checkpoint()} Try a "
                    f"lower learning rate than {learner.learning_rate:g}, or a longer warm-up."
                )

    def _last_checkpoint(self) -> str:
        checkpoints = list_checkpoints(self.run.output_dir)
        return f"The last good checkpoint is {checkpoints[-1]}." if checkpoints else "There is no checkpoint yet."

    def _call(self, event: str, **details: Any) -> None:
        """Tell the callbacks; what they return replaces the control, as in `transformers.Trainer`."""
        first = self.learners[0].sae if self.learners else None
        for callback in self.callbacks:
            handler = getattr(callback, event)
            known = {"model": first, "processing_class": self.tokenizer, **details}
            self.control = handler(self.args, self.state, self.control, **known) or self.control

    # Stopping early

    def _stop(self, signal_number: int) -> None:
        self._save_checkpoint()
        self._hand_over_checkpoint()
        step, name = self.state.global_step, signal.Signals(signal_number).name
        saved = f"saved {self.run.output_dir / f'checkpoint-{step}'}."
        if self.run.is_main and self._saved_step != step:
            saved = f"could not save it. {self._last_checkpoint()}"
        self.log.close()
        raise TrainingInterrupted(
            f"Stopped by {name} after step {step} of {self.state.max_steps}; {saved} To go on, give the same command "
            "with --resume-from-checkpoint.",
            exit_code=128 + signal_number,
        )

    def _save_what_there_is(self) -> None:
        """A checkpoint of the steps taken, when data ends the run. Of several processes one alone cannot save."""
        if self.run.num_processes == 1 and self.state.global_step > self._first_step:
            self._save_checkpoint()
            self._hand_over_checkpoint()

    def _hand_over_checkpoint(self) -> None:
        if self._saved_step == self.state.global_step:
            self._hand_over(self.run.output_dir / f"checkpoint-{self._saved_step}")

    def _hand_over(self, folder: Path) -> None:
        """Nobody trains on: the SAEs that were given are now what a reader finds in `folder`."""
        self.saver.hand_over(self.state.global_step, self.learners, self.saes, folder)

    # Checkpoints

    def _save_checkpoint(self) -> None:
        """Save, unless this step is saved already.

        A full disk is no reason to end the run: older checkpoints stay, and the next save may find room.
        """
        if self._saved_step == self.state.global_step:
            return
        self._check_finite()
        state = {
            "step": self.state.global_step,
            **self._length.to_dict(),
            "tokens": self.state.num_input_tokens_seen,
            "tokens_per_step": self.run.tokens_per_step,
            "threads": torch.get_num_threads(),
            "arguments": self.args.to_dict(),
            "data": self._data,
            "feeds": self._loader_states(),
            "skipped_documents": self._skipped_documents(),
        }
        path = self.saver.save_checkpoint(self.state.global_step, self.learners, state)
        if path is not None:
            self._saved_step = self.state.global_step
            if self.pusher is not None:
                self.pusher.push_checkpoint(path, self.state.global_step)
        with self._calibrated():
            self._call("on_save")

    def _fingerprints(self) -> dict[str, Any]:
        """Which data this run reads; of streams before any pass of its own."""
        measured_on = None if self._eval_dataset is None else fingerprint(self._eval_dataset)
        return {"train": self.loader.fingerprint(), "eval": measured_on}

    def _loader_states(self) -> list[dict[str, Any]]:
        """The places of all processes in the data; one, where all are at the same."""
        own = [self.loader.state_dict()]
        return own if self.loader.sliced else self.run.gather(own)

    def _skipped_documents(self) -> list[int]:
        """The numbers of the documents that no process could read."""
        return sorted(set(self.run.gather(sorted(self.loader.unreadable_documents))))

    def _configs_in(self, checkpoint: Checkpoint | None) -> dict[str, MatryoshkaSAEConfig]:
        """The configurations in a checkpoint of those SAEs of this run that it has, by name."""
        if checkpoint is None:
            return {}
        folders = {name: self.run.sae_folder(checkpoint.path, name) for name in self.saes}
        return {
            name: MatryoshkaSAEConfig.from_pretrained(folder)
            for name, folder in folders.items()
            if (folder / "config.json").is_file()
        }

    def _load_checkpoint(self, checkpoint: Checkpoint) -> None:
        path, state = checkpoint.path, checkpoint.state
        check_same_run(
            checkpoint, self.run, {self.run.sae_folder(path, name): sae.config for name, sae in self.saes.items()}
        )
        same_data = check_same_data(checkpoint, self._data["train"], self._data["eval"], self.args.allow_other_data)
        for learner in self.learners:
            read_learner(learner, self.run.sae_folder(path, learner.name))
        if same_data:
            try:
                resume_loader(self.loader, state["feeds"])
            except InputError as error:
                raise CheckpointError(
                    f"{path} does not say where in the data the run goes on: {error}. Resume from another checkpoint."
                ) from error
            self.loader.unreadable_documents.update(state["skipped_documents"])
        self.state.global_step = self._first_step = state["step"]
        self.state.num_input_tokens_seen = state["tokens"]
        self.log.rewind(state["step"])

    # Measuring

    def evaluate(self) -> dict[str, Measurement]:
        """Measure every SAE as it is now on the held-out tokens, with calibrated thresholds.

        What only measuring can tell is recorded in it: each latent's firing rate and largest activation, and L0 and
        FVE of every prefix. All processes must call this.

        Returns:
            Each SAE's measurement, by name; cross-entropies on the main process.

        Raises:
            RuntimeError: Before training.
        """
        if not self.learners:
            raise RuntimeError(
                "evaluate() measures what was trained; call train() first. `hf-msae eval` measures an SAE that exists."
            )
        with self._calibrated():
            return self.evaluator.measure(self.learners)

    def _calibrated(self) -> AbstractContextManager[None]:
        return self.evaluator.calibrated(self.learners, self.state.global_step)

    def _measure_in_passing(self) -> None:
        for name, measurement in self.evaluate().items():
            levels = [asdict(level) for level in measurement.levels]
            entry = self._entry({"eval_levels": levels})
            self.log.write(name, entry)
            self._remember(name, entry)
        with self._calibrated():
            self._call("on_evaluate", metrics={})

    # The end

    def _facts(self, learner: Learner, skipped: list[int]) -> dict[str, Any]:
        """What metrics.json and the card say of the run besides measurements."""
        return {
            "steps": self.state.global_step,
            "training_tokens": self.state.num_input_tokens_seen,
            "tokens_per_second": round(self._tokens_per_second(), 1),
            "training_seconds": round(self._training_seconds, 1),
            "precision": "bfloat16" if self.args.bf16 else "TF32" if self.args.tf32 else "float32",
            "dataset": self.loader.description,
            "training_outliers": self.loader.num_outliers,
            "learning_rate": learner.learning_rate,
            "skipped_documents": {"count": len(skipped), "numbers": skipped[:MAX_SKIPPED_NAMED]},
            "held_out": dict(self.evaluator.held_out.facts),
        }

    def _warn_of_other_kinds(self) -> None:
        """Say where the held-out text is unlike the training text, so that what was measured on it means less."""
        for site, measured_on in self.evaluator.populations.items():
            trained_on = self.loader.populations.get(site)
            distance = None if trained_on is None else trained_on.differs(measured_on)
            if distance is not None:
                logger.warning("%s: %s", site, describe_difference(distance, self.loader.description))

    def _finish(self) -> dict[str, Measurement]:
        measurements = self.evaluate()
        if self.run.accelerator.is_main_process:
            self._warn_of_other_kinds()
        skipped = self._skipped_documents()
        facts = {learner.name: self._facts(learner, skipped) for learner in self.learners}
        self.saver.save_results(self.state.global_step, self.learners, measurements, facts)
        self._hand_over(self.run.output_dir)
        self._call("on_train_end", model=next(iter(self.saes.values())))
        self.log.close()
        if self.pusher is not None:
            self.pusher.push_result()
        return measurements
