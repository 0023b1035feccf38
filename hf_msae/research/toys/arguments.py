"""What a toy experiment trains on what. Read before anything that takes time is imported."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from hf_msae.errors import InputError

if TYPE_CHECKING:
    from hf_msae.research.toys.toys import Toy

# What each variant changes in the configuration of the SAE.
VARIANTS: dict[str, "Callable[[Toy], dict[str, Any]]"] = {
    "vanilla": lambda toy: {"prefix_sizes": [toy.num_latents]},
    "fixed": lambda toy: {},
    "pareto": lambda toy: {"prefix_sampling": "pareto"},
    "balanced": lambda toy: {"balance": toy.balance},
    "detached": lambda toy: {"detach_prefixes": True},
}
UNTRAINED, SHUFFLED = "untrained", "shuffled"


@dataclass
class ToyArguments:
    """What is trained on what."""

    _argument_group_name = "toy"

    world: Literal["tree", "parent", "absorption", "hedging", "random"] = field(
        default="tree", metadata={"help": "The hierarchy: a published toy, or a random forest."}
    )
    variants: list[str] = field(
        default_factory=lambda: list(VARIANTS),
        metadata={"help": f"What to train, of {', '.join(VARIANTS)}."},
    )
    seeds: int = field(default=5, metadata={"help": "Runs of each variant; spreads are over these."})
    steps: int = field(default=600, metadata={"help": "Training steps of a run."})
    batch_size: int = field(default=1000, metadata={"help": "Samples in a step."})
    learning_rate: float = field(default=0.1, metadata={"help": "Peak learning rate."})
    activation: Literal["relu", "batch_topk", "topk", "jumprelu"] = field(
        default="relu", metadata={"help": "What the published toys use is relu; L0 is driven to the truth's."}
    )
    init: Literal["random", "truth"] = field(
        default="random",
        metadata={"help": "Start at random, or at the true directions: is the truth stable under this loss?"},
    )
    output_dir: str = field(default="runs/toy", metadata={"help": "Where recovery.json and heatmaps.png go."})

    def __post_init__(self) -> None:
        unknown = [name for name in self.variants if name not in VARIANTS]
        if unknown or not self.variants:
            given = ", ".join(unknown) or "none"
            raise InputError(f"--variants must be of {', '.join(VARIANTS)}; got {given}.")
        if self.seeds < 1:
            raise InputError(f"--seeds must be at least 1, got {self.seeds}.")
        if self.steps < 1:
            raise InputError(f"--steps must be at least 1, got {self.steps}.")
