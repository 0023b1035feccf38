"""The training loop: one pass of a language model feeds one or many SAEs.

The loop is plain: take a batch of activations, give it to every learner, now and then log, measure and save. What is
hard lives elsewhere: resumable data in `feeds`, one SAE's step in `learner`, whole-or-absent folders in `checkpoints`,
what the run leaves behind in `results`.
"""

import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, tqdm
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState

from hf_msae.data import ActivationError, CachedActivations, as_documents
from hf_msae.metrics import Measurement, measure_cross_entropy, measure_reconstruction, merge
from hf_msae.modeling import MatryoshkaSAE
from hf_msae.sites import Site, resolve_site, site_width
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
from hf_msae.training.feeds import CacheFeed, Feed, TextFeed
from hf_msae.training.held_out import HeldOut, HeldOutCache, HeldOutText
from hf_msae.training.interrupts import InterruptFlag
from hf_msae.training.learner import Learner
from hf_msae.training.results import RunLog, prepare_output_dir, save_quietly, write_results

logger = logging.getLogger(__name__)

DEFAULT_CONTEXT_LENGTH = 512
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
        self.saes = _named(sae)
        prepare_output_dir(self.output_dir, args, self.accelerator)
        self.sites = self._resolve_sites()
        self.held_out, self.feed = self._open_data(train_dataset, eval_dataset)
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

    # Set-up

    def _resolve_sites(self) -> dict[str, Site]:
        """Each SAE's site, checked against the model's width there and written into its configuration."""
        sites = {}
        for name, sae in self.saes.items():
            if sae.config.site is None:
                raise ValueError(f"The SAE {name!r} has no site. Set config.site, for example to 'layers.12'.")
            if self.model is None:
                sites[name] = Site.parse(sae.config.site)
                continue
            sites[name] = resolve_site(self.model, sae.config.site)
            width = site_width(self.model.eval(), sites[name])
            if width != sae.config.hidden_size:
                raise ValueError(
                    f"The activations at {sites[name]} have {width} dimensions, but the SAE {name!r} was made for "
                    f"hidden_size={sae.config.hidden_size}. Make it with hidden_size={width}."
                )
            if sae.config.k > sae.config.prefix_sizes[0] / 2:
                logger.warning(
                    "%s: k=%g is more than half of the first prefix of %d latents, which leaves that level hardly "
                    "sparse; make it larger, or k smaller.",
                    name,
                    sae.config.k,
                    sae.config.prefix_sizes[0],
                )
            sae.config.site = str(sites[name])
            sae.config.base_model = self.model.config.name_or_path or None
        return sites

    def _open_data(self, train_dataset: Any, eval_dataset: Any) -> tuple[HeldOut, Feed]:
        args, rank, world_size = self.args, self.accelerator.process_index, self.accelerator.num_processes
        sites = list(dict.fromkeys(self.sites.values()))
        held_out: HeldOut | None = None
        if self.model is not None and self.tokenizer is not None:
            context_length = self._context_length(self.model)
            if eval_dataset is not None:
                documents = as_documents(eval_dataset)
                held_out = HeldOutText(self.model, self.tokenizer, sites, documents, args, context_length)
        if isinstance(train_dataset, CachedActivations):
            skip_rows = 0
            if held_out is None:
                held_out = HeldOutCache(train_dataset, args)
                skip_rows = held_out.num_rows
            return held_out, CacheFeed(train_dataset, sites, args, skip_rows, rank, world_size)
        if self.model is None or self.tokenizer is None:
            raise ValueError("Training on text needs the language model and its tokenizer (processing_class).")
        documents = as_documents(train_dataset)
        if held_out is None:
            held_out = HeldOutText(self.model, self.tokenizer, sites, documents, args, context_length)
            documents = documents.skip(held_out.num_documents)
        for sae in self.saes.values():
            sae.config.context_length = context_length
            sae.config.prepend_bos = self.tokenizer.bos_token_id is not None
        feed = TextFeed(self.model, self.tokenizer, sites, documents, args, context_length, rank, world_size)
        return held_out, feed

    def _context_length(self, model: PreTrainedModel) -> int:
        """Tokens per window; refuses more than the model's positions."""
        config = model.config.get_text_config().to_dict()
        names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
        limit = next((config[name] for name in names if config.get(name)), None)
        wanted = self.args.context_length
        if wanted is None:
            return min(DEFAULT_CONTEXT_LENGTH, limit or DEFAULT_CONTEXT_LENGTH)
        if limit is not None and wanted > limit:
            raise ValueError(
                f"context_length={wanted} is more than the {limit} positions of "
                f"{model.config.name_or_path or 'the model'}."
            )
        return wanted

    def _max_steps(self) -> int:
        per_step = self.args.per_device_train_batch_size * self.accelerator.num_processes
        if self.args.max_steps > 0:
            return self.args.max_steps
        tokens = self.args.max_tokens if self.args.max_tokens is not None else self.feed.tokens_per_pass()
        if tokens < per_step:
            raise ValueError(
                f"There are {tokens:,} tokens to train on, fewer than one step of {per_step:,}. Use more data, a "
                f"smaller "
                "per_device_train_batch_size, or hold out fewer tokens (eval_tokens, calibration_tokens)."
            )
        return tokens // per_step

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
        max_steps = read_state(checkpoint)["max_steps"] if checkpoint else self._max_steps()
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
            with self._calibrated(learner):
                save_quietly(learner.sae, folder)
            torch.save(
                {"learner": learner.state_dict(), "threshold": learner.sae.threshold.data}, folder / "learner.pt"
            )

    @contextmanager
    def _calibrated(self, learner: Learner) -> Iterator[None]:
        """The learner's SAE as a reader gets it: in evaluation mode, its threshold set on held-out activations."""
        sae = learner.sae
        training_threshold = sae.threshold.detach().clone()
        sae.eval()
        sae.calibrate_threshold(batch[learner.site].to(sae.device) for batch in self.held_out.calibration())
        try:
            yield
        finally:
            sae.train()
            with torch.no_grad():
                sae.threshold.copy_(training_threshold)

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
        return {learner.name: self._measure(learner) for learner in self.learners}

    def _measure(self, learner: Learner) -> Measurement:
        with self._calibrated(learner):
            return self._measure_calibrated(learner)

    def _measure_calibrated(self, learner: Learner) -> Measurement:
        sae, name = learner.sae, learner.name
        meter = measure_reconstruction({name: (learner.site, sae)}, self.held_out.evaluation())[name]
        cross_entropy = None
        if self.model is not None and self.model.get_output_embeddings() is not None and self.args.ce_tokens:
            batches = list(self.held_out.token_batches())
            if batches:
                cross_entropy = measure_cross_entropy(self.model, learner.site, sae, meter.mean, batches)
        with torch.no_grad():
            sae.max_activation.copy_(meter.max_activation)
            sae.firing_rate.copy_(meter.firing_rate)
        measurement = merge(meter, cross_entropy)
        sae.config.measured = {
            "tokens": measurement.tokens,
            "l0": [round(level.l0, 4) for level in measurement.levels],
            "fve": [round(level.fve, 5) for level in measurement.levels],
        }
        return measurement

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
                with self._calibrated(learner):
                    measurements[learner.name] = self._measure_calibrated(learner)
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
        self._call("on_train_end")
        self.log.close()
        return measurements


def _named(sae: MatryoshkaSAE | Sequence[MatryoshkaSAE] | Mapping[str, MatryoshkaSAE]) -> dict[str, MatryoshkaSAE]:
    """SAEs by name; a name says site, width and k, which is what a grid varies."""
    if isinstance(sae, Mapping):
        return dict(sae)
    saes = [sae] if isinstance(sae, MatryoshkaSAE) else list(sae)
    if not saes:
        raise ValueError("There is no SAE to train: give one MatryoshkaSAE, a list or a mapping of them.")
    named: dict[str, MatryoshkaSAE] = {}
    for item in saes:
        site = (item.config.site or "site").replace(":", ".").replace(os.sep, ".")
        name = f"{site}-{item.config.num_latents}-k{item.config.k:g}"
        if name in named:
            raise ValueError(
                f"Two SAEs would be called {name!r}; give a mapping from names to SAEs instead of a list."
            )
        named[name] = item
    return named
