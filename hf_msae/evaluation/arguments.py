"""What an evaluation measures, beside what, and on how much. Read before anything that takes time is imported."""

from dataclasses import dataclass, field

from hf_msae import reading_fields
from hf_msae.errors import InputError
from hf_msae.evaluation.names import DEFAULT_METRICS, METRICS
from hf_msae.outliers import check_multiple
from hf_msae.reading_fields import WITHOUT_A_LIMIT


@dataclass
class EvaluationArguments:
    """What is measured, and on how much: the arguments of [`run_evaluation`] and of `hf-msae eval`."""

    _argument_group_name = "evaluation"

    metrics: list[str] = field(
        default_factory=lambda: list(DEFAULT_METRICS),
        metadata={
            "help": f"Of {', '.join(METRICS)}; splitting goes with absorption. Default: all but the last three, which "
            "take longer.",
        },
    )
    baselines: list[str] = field(
        default_factory=lambda: ["pca", "random"],
        metadata={
            "help": "Of batch_topk, pruned_topk, frozen_decoder (trained), pca, random (built); 'none' for none. "
            "Default: pca random.",
        },
    )
    baseline_seeds: int = field(default=1, metadata={"help": "How many seeds of each trained or random baseline."})
    baseline_tokens: int | None = field(
        default=None, metadata={"help": "Train baselines on this many tokens. Default: as many as the SAE was."}
    )
    output_dir: str = field(default="runs/evaluation", metadata={"help": "Where the JSON and the report go."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace an evaluation that is there."})
    eval_tokens: int = field(default=100_000, metadata={"help": "Tokens to measure on, of held-out documents."})
    ce_tokens: int = field(default=25_000, metadata={"help": "How many of them cross-entropy takes; 0 skips it."})
    rate_tokens: int = field(default=25_000, metadata={"help": "How many of them rate and distortion take."})
    context_length: int | None = field(default=None, metadata={"help": "Tokens per window. Default: as in training."})
    packing: bool = reading_fields.packing()
    lm_batch_size: int = reading_fields.lm_batch_size()
    norm_outlier_multiple: float | None = reading_fields.norm_outlier_multiple(where=WITHOUT_A_LIMIT)
    stories: int = field(
        default=600, metadata={"help": "Stories whose words are labelled, for concept metrics; 0 skips these."}
    )
    labelled: str | None = field(
        default=None, metadata={"help": "A .jsonl file with a text and a label in each line, instead of stories."}
    )
    label_column: str = field(default="label", metadata={"help": "Column with the label."})
    splits: int = field(default=3, metadata={"help": "How often concept metrics divide the labelled documents anew."})
    seed: int = field(default=0, metadata={"help": "Fixes baselines, and what metrics draw."})
    use_cpu: bool = field(default=False, metadata={"help": "Stay on the CPU even where an accelerator is present."})

    def __post_init__(self) -> None:
        from hf_msae.evaluation.baselines import check_baselines
        from hf_msae.evaluation.suite import find_metrics

        self.baselines = [name for name in self.baselines if name != "none"]
        find_metrics(self.metrics)
        check_baselines(self.baselines)
        check_multiple(self.norm_outlier_multiple)
        least = {"baseline_seeds": 1, "eval_tokens": 2, "rate_tokens": 2, "lm_batch_size": 1, "splits": 1}
        for name, lowest in least.items():
            if getattr(self, name) < lowest:
                raise InputError(f"{name} must be at least {lowest}, got {getattr(self, name)}.")
        for name in ("ce_tokens", "stories"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} must not be negative, got {getattr(self, name)}.")
