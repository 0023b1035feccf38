"""The bar of a run: steps, what the latest log line says, and what the next step waits for."""

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from accelerate.utils import tqdm


class TrainingBar:
    """Shows how far a run is, on the main process alone.

    Args:
        done: Steps that were taken before.
        total: Steps of the run.
        disable: Whether to show nothing.
    """

    def __init__(self, done: int, total: int, disable: bool) -> None:
        self._bar = tqdm(total=total, initial=done, desc="Training", unit="step", miniters=0, disable=disable)

    def __enter__(self) -> "TrainingBar":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def reading(self, done: int, total: int) -> None:
        """Say how many tokens the language model has read of those that the next step waits for."""
        self._bar.set_description_str(f"Reading {done:,} of {total:,} tokens, then training", refresh=False)
        self._bar.update(0)

    def step(self) -> None:
        """Count a step."""
        self._bar.set_description_str("Training", refresh=False)
        self._bar.update()

    def log(self, values: Mapping[str, Any], tokens_per_second: float) -> None:
        """Show some of an SAE's line of the log.

        Args:
            values: As `Learner.read_log` gives them.
            tokens_per_second: Of the run.
        """
        shown = {"loss": f"{values['loss']:.4f}", "L0": f"{values['l0']:.1f}", "dead": f"{values['dead']:.1%}"}
        self._bar.set_postfix({"tokens/s": f"{tokens_per_second:,.0f}", **shown})
