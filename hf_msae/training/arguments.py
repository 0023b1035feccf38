"""How a run is trained: batch, schedule, checkpoints, measuring.

Names are those of `transformers.TrainingArguments` wherever the meaning is the same. What an SAE is (its sizes, its
activation, its loss) is in `MatryoshkaSAEConfig`; what it is trained on is given to the trainer.
"""

import os
import re
from dataclasses import asdict, dataclass, field, fields
from types import MappingProxyType
from typing import Any, Literal, TypeVar, get_args, get_type_hints

from hf_msae.errors import InputError
from hf_msae.outliers import NORM_OUTLIER_MULTIPLE, check_multiple

# What `resume_from_checkpoint` may be besides a folder, as words.
RESUME_WORDS = {"true": "last", "false": None, "none": None}

Arguments = TypeVar("Arguments")


def help_from_docstring(cls: type[Arguments]) -> type[Arguments]:
    """Give each field of a dataclass the help that the `Args` of its docstring say, so that it is written once.

    Names of fields in backticks become flags. Without docstrings (`python -OO`) there is no help.

    Args:
        cls: The dataclass.

    Returns:
        The same class, its fields with `metadata["help"]`.
    """
    section = re.search(r"^    Args:\n(.*?)\n\n", cls.__doc__ or "", re.DOTALL | re.MULTILINE)
    entries = re.findall(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", section[1] if section else "", re.MULTILINE)
    texts = {name: " ".join(text.split()) for name, text in entries}
    for known in fields(cls):  # type: ignore[arg-type]
        words = texts.get(known.name, "").replace("%", "%%")  # argparse fills in what follows a %
        words = re.sub(r"`(\w+)`", lambda found: _flag(found[1]) if found[1] in texts else found[0], words)
        known.metadata = MappingProxyType({**known.metadata, "help": words})
    return cls


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


@help_from_docstring
@dataclass
class SAETrainingArguments:
    """How a run is trained. Names are those of `transformers.TrainingArguments` wherever the meaning is the same.

    Args:
        output_dir: Where the SAE, its metrics and checkpoints go.
        overwrite_output_dir: Delete what an earlier run left in the output directory.
        resume_from_checkpoint: A checkpoint folder, or 'last' (or true) for the newest one in the output directory.
        allow_other_data: Resume although the data is not that of the checkpoint; other training data is read from its
            beginning.
        init_from: Begin with the weights of this SAE: a folder or a Hub repo, of any width. A wider one is cut to its
            first latents, a narrower one gets new latents behind its own.
        max_tokens: Train on this many tokens. Default: one pass over the dataset.
        max_steps: Train this many steps; overrides `max_tokens`.
        per_device_train_batch_size: Activation vectors per micro-batch and process.
        gradient_accumulation_steps: Micro-batches per step; they are one batch in all but memory, the selection
            included.
        shard_latents: Give each process some of the latents, for dictionaries too wide for one device.
        learning_rate: Peak learning rate. Default: by the width of the dictionary (see the docs).
        lr_scheduler_type: Shape of the decay: linear or cosine to zero over the last `decay_steps`, or none.
        warmup_steps: Steps of linear warm-up; below 1: as a share of all steps.
        decay_steps: Steps of decay at the end; 1 or below: as a share of all steps.
        k_anneal_steps: Steps over which k falls from `k_initial` to k; below 1: as a share of all steps.
        k_initial: Where k-annealing starts. Default: 8 times k, at most a quarter of the latents.
        inner_share_start: Step from which `inner_decoder_share` and `inner_activation_share` of the SAE hold, inner
            levels' gradients being whole before; below 1: as a share of all steps.
        p_anneal_start: Step from which the p of the penalty falls from 1 to `p_end` of the SAE; below 1: as a share of
            all steps.
        n_sparsity_updates: In how many equal steps, as long as each other, p falls; at each the weight of the penalty
            is changed so that the penalty is as strong as before.
        sparsity_queue_length: Of how many training steps before such a change the penalties are compared for that.
        sort_latents_at: Step before which latents, and all that training keeps of them, are put in order of their mean
            squared activation, the largest first; below 1: as a share of all steps. Default: never.
        kl_from: Step from which the language model's predictions count, too: the KL divergence between it and itself
            with the reconstructions in place; below 1: as a share of all steps. Default: never.
        kl_weight: Size of that divergence's part of the loss, as a multiple of the reconstruction's.
        adam_beta1: Adam's first beta.
        adam_beta2: Adam's second beta.
        adam_epsilon: Adam's epsilon.
        max_grad_norm: Clip the gradient's norm to this; 0 does not clip.
        dead_after_tokens: A latent silent for this many tokens counts as dead. Default: 10M, or 5% of a shorter run.
        bf16: Run the SAE's matrix products in bfloat16 (weights stay fp32). Default: on GPUs that have it.
        tf32: Run those that stay fp32 in TF32. Default: on GPUs that have it, where `bf16` is refused.
        cuda_graphs: Capture steps in CUDA graphs and replay them, which is of use for small SAEs; needs one GPU, and
            `batch_topk` or `topk`.
        seed: Fixes initialisation and the order of tokens.
        use_cpu: Train on the CPU even where an accelerator is present.
        context_length: Tokens per window. Default: 512, or the model's maximum if that is smaller.
        shuffle: Read documents in an order that the seed fixes; of a stream those of each 10,000 or 64 MB are mixed.
        packing: Cut all documents, one after another, into full windows; otherwise one document per window.
        block_tokens: Tokens harvested and shuffled together. More mixes better and takes more memory.
        lm_batch_size: Windows per forward pass of the language model.
        norm_outlier_multiple: Leave out tokens whose activation norm exceeds this multiple of the median (attention
            sinks), in training and in everything that is measured; 0 keeps all.
        eval_tokens: Held-out tokens that metrics are measured on.
        calibration_tokens: Further held-out tokens on which the inference threshold is set.
        ce_tokens: How many of the held-out tokens cross-entropy is measured on; 0 skips it.
        eval_steps: Measure on held-out tokens every so many steps too. Default: only at the end.
        logging_steps: Steps between lines of training_log.jsonl.
        save_steps: Steps between checkpoints; 0 saves none.
        save_total_limit: Keep only this many of the newest checkpoints.
        ddp_timeout: Seconds after which a process that does not answer the others ends the run.
        push_to_hub: Push the result to the Hub; what goes wrong there never ends the run.
        hub_model_id: The repo, owner/name. Default: your own, by the output directory's name.
        hub_strategy: Push the result only, or every checkpoint's SAEs, too.
        hub_private_repo: Make a new repo private, and refuse a public one.
        hub_token: A token that may write. Default: HF_TOKEN, or that of `hf auth login`. Never saved.
        report_to: Trackers: tensorboard, wandb, trackio, ..., all that are installed, or none.
        run_name: Name of the run for trackers.
        disable_tqdm: Show no progress bar.

    Raises:
        InputError: For values that cannot work.
    """

    _argument_group_name = "training"

    output_dir: str = "runs/sae"
    overwrite_output_dir: bool = False
    resume_from_checkpoint: str | None = field(default=None, metadata={"nargs": "?", "const": "last"})
    allow_other_data: bool = False
    init_from: str | None = None

    max_tokens: int | None = None
    max_steps: int = -1
    per_device_train_batch_size: int = field(default=4096, metadata={"aliases": ["--batch-size"]})
    gradient_accumulation_steps: int = 1
    shard_latents: bool = False
    learning_rate: float | None = None
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "linear"
    warmup_steps: float = 0.02
    decay_steps: float = 0.6
    k_anneal_steps: float = 0.0
    k_initial: float | None = None
    inner_share_start: float = 0.25
    p_anneal_start: float = 0.25
    n_sparsity_updates: int = 10
    sparsity_queue_length: int = 10
    sort_latents_at: float | None = None
    kl_from: float | None = None
    kl_weight: float = 1.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.98
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    dead_after_tokens: int | None = None
    bf16: bool | None = None
    tf32: bool | None = None
    cuda_graphs: bool = False
    seed: int = 0
    use_cpu: bool = False

    context_length: int | None = None
    shuffle: bool = True
    packing: bool = True
    block_tokens: int = 262_144
    lm_batch_size: int = 16
    norm_outlier_multiple: float | None = NORM_OUTLIER_MULTIPLE

    eval_tokens: int = 100_000
    calibration_tokens: int = 50_000
    ce_tokens: int = 25_000
    eval_steps: int | None = None

    logging_steps: int = 50
    save_steps: int = 1000
    save_total_limit: int | None = 2
    ddp_timeout: int = 1800

    push_to_hub: bool = False
    hub_model_id: str | None = None
    hub_strategy: Literal["end", "every_save"] = "end"
    hub_private_repo: bool = False
    hub_token: str | None = field(default=None, repr=False)

    report_to: list[str] = field(default_factory=list, metadata={"action": "extend"})
    run_name: str | None = None
    disable_tqdm: bool = False

    def __post_init__(self) -> None:
        self._take_habits()
        for name, kind in get_type_hints(type(self)).items():
            if getattr(self, name) is None and type(None) not in get_args(kind):
                raise InputError(f"{name} must not be None; leave it out for its default.")
        positive = (
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "n_sparsity_updates",
            "sparsity_queue_length",
            "block_tokens",
            "lm_batch_size",
            "logging_steps",
            "eval_tokens",
            "calibration_tokens",
            "ddp_timeout",
        )
        for name in positive:
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}.")
        steps = ("warmup_steps", "decay_steps", "k_anneal_steps", "inner_share_start", "p_anneal_start", "save_steps")
        for name in (*steps, "max_grad_norm", "ce_tokens"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} must not be negative, got {getattr(self, name)}.")
        if self.sort_latents_at is not None and self.sort_latents_at <= 0:
            raise InputError(
                f"sort_latents_at must be above 0, got {self.sort_latents_at}; leave it out where latents are to stay."
            )
        if self.kl_from is not None and self.kl_from < 0:
            raise InputError(f"kl_from must not be negative, got {self.kl_from}; leave it out for none.")
        if self.kl_weight <= 0:
            raise InputError(f"kl_weight must be above 0, got {self.kl_weight}; leave kl_from out for none.")
        if self.learning_rate is not None and self.learning_rate <= 0:
            raise InputError(f"learning_rate must be above 0, got {self.learning_rate}.")
        if self.max_tokens is not None and self.max_tokens < self.per_device_train_batch_size:
            raise InputError(
                f"max_tokens={self.max_tokens:,} is less than one batch of {self.per_device_train_batch_size:,}; "
                "train on more tokens or take a smaller per_device_train_batch_size."
            )
        check_multiple(self.norm_outlier_multiple)
        if self.save_total_limit is not None and self.save_total_limit < 1:
            raise InputError(f"save_total_limit must be at least 1 or None, got {self.save_total_limit}.")
        if self.overwrite_output_dir and self.resume_from_checkpoint:
            raise InputError(
                "overwrite_output_dir deletes what resume_from_checkpoint would resume; give one of them."
            )
        if self.hub_model_id is not None and not self.push_to_hub:
            raise InputError(f"hub_model_id={self.hub_model_id!r} is of use only with push_to_hub.")

    def _take_habits(self) -> None:
        """What people write for `transformers.TrainingArguments`, in the form that is used here."""
        if str(self.resume_from_checkpoint).lower() in RESUME_WORDS:
            self.resume_from_checkpoint = RESUME_WORDS[str(self.resume_from_checkpoint).lower()]
        for name in ("output_dir", "resume_from_checkpoint", "init_from"):
            if getattr(self, name) is not None:
                setattr(self, name, os.path.expanduser(getattr(self, name)))
        trackers = [self.report_to] if isinstance(self.report_to, str) else list(self.report_to or [])
        self.report_to = [] if trackers == ["none"] else trackers

    @property
    def on_cpu(self) -> bool:
        """Whether to train on the CPU."""
        from hf_msae.devices import stays_on_cpu  # not before: commands read their flags without torch

        return stays_on_cpu(self.use_cpu)

    @property
    def tokens_per_process(self) -> int:
        """Activation vectors that a process contributes to a step."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    def tokens_per_step(self, num_processes: int) -> int:
        """Activation vectors of a step, of all processes together.

        Args:
            num_processes: How many there are.

        Returns:
            Their number.
        """
        return self.tokens_per_process * num_processes

    def to_dict(self) -> dict[str, Any]:
        """All fields but the token, JSON-able: this is what logs, checkpoints and results record."""
        return {name: value for name, value in asdict(self).items() if name != "hub_token"}
