"""What hf_msae promises on a GPU, checked on the one that is here, in ten minutes at most: `make gpu`.

    python benchmarks/gpu_check.py                      # prints PASS, FAIL or SKIP a line, writes benchmarks/results/
    python benchmarks/gpu_check.py --only syncs bits    # some of the checks
    python benchmarks/gpu_check.py --device cpu --small # the same checks of the CPU against itself: tries this script

Nothing ends at the first failure: a check that fails, runs out of memory or has no time left is told, and the next one
follows. What the card, the compiler or the number of cards does not allow is skipped, with the reason. The exit status
is 0 where nothing failed, 1 where something did, 2 where there is no GPU.
"""

import argparse
import json
import platform
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

RESULTS = Path(__file__).parent / "results"
SECONDS = 600


class Skipped(Exception):
    """A check that means nothing here, with the reason."""


@dataclass(frozen=True)
class Place:
    """Where checks run, and how large.

    Args:
        device: The GPU; the CPU, to try the checks themselves.
        small: Whether sizes are those of a test.
    """

    device: torch.device
    small: bool = False

    def needs_gpu(self) -> None:
        """Raises `Skipped` on the CPU."""
        if self.device.type != "cuda":
            raise Skipped("needs a GPU")


@dataclass
class Outcome:
    """What a check found."""

    name: str
    says: str
    status: str = "PASS"
    reason: str = ""
    seconds: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return (
            f"{self.status:5}{self.name:16}{self.says} ({self.seconds:.1f} s){': ' * bool(self.reason)}{self.reason}"
        )


Check = Callable[[Place], dict[str, Any]]


def run_check(name: str, check: Check, place: Place, left: float) -> Outcome:
    """One check, whatever happens in it.

    Args:
        name: How it is called.
        check: It gives facts, and raises `Skipped`, `AssertionError` or anything.
        place: Where.
        left: Seconds that are left; without any, it is skipped.
    """
    outcome = Outcome(name, (check.__doc__ or "").split("\n")[0])
    began = time.perf_counter()
    try:
        if left <= 0:
            raise Skipped("no time is left")
        outcome.facts = check(place)
    except Skipped as reason:
        outcome.status, outcome.reason = "SKIP", str(reason)
    except torch.OutOfMemoryError as error:
        outcome.status, outcome.reason = "SKIP", f"out of memory: {str(error).splitlines()[0]}"
    except Exception as error:  # the next check is to follow, whatever this one does
        outcome.status, outcome.reason = "FAIL", (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        outcome.facts = {"traceback": traceback.format_exc()}
    if place.device.type == "cuda":
        torch.cuda.empty_cache()
    outcome.seconds = time.perf_counter() - began
    return outcome


def run_checks(checks: dict[str, Check], place: Place, seconds: float = SECONDS) -> list[Outcome]:
    """All checks, one after the other, each told as it ends."""
    end, outcomes = time.monotonic() + seconds, []
    for name, check in checks.items():
        outcomes.append(run_check(name, check, place, end - time.monotonic()))
        print(outcomes[-1], flush=True)
    return outcomes


def describe(place: Place) -> dict[str, Any]:
    """What the numbers depend on."""
    found: dict[str, Any] = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": str(place.device),
        "small": place.small,
    }
    if place.device.type == "cuda":
        card = torch.cuda.get_device_properties(place.device)
        found |= {"card": card.name, "memory": card.total_memory, "capability": f"{card.major}.{card.minor}"}
        found |= {"cards": torch.cuda.device_count(), "cuda": torch.version.cuda}
    return found


def main() -> int:
    from gpu_checks import CHECKS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, ...; cpu tries the checks themselves")
    parser.add_argument("--small", action="store_true", help="sizes of a test")
    parser.add_argument("--only", nargs="+", choices=list(CHECKS), default=list(CHECKS), metavar="NAME")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="no check begins after these")
    parser.add_argument("--json", help="where numbers go; default: benchmarks/results/gpu_check-CARD.json")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("There is no GPU that torch sees, so nothing was checked; --device cpu --small tries the checks.")
        return 2
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    place = Place(device, options.small)
    about = describe(place)
    outcomes = run_checks({name: CHECKS[name] for name in options.only}, place, options.seconds)
    card = str(about.get("card", "cpu")).replace(" ", "-")
    path = Path(options.json or RESULTS / f"gpu_check-{card}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps({"where": about, "checks": [asdict(outcome) for outcome in outcomes]}, indent=2), encoding="utf-8"
    )
    counts = {status: sum(outcome.status == status for outcome in outcomes) for status in ("PASS", "FAIL", "SKIP")}
    print(", ".join(f"{number} {status}" for status, number in counts.items()) + f"; written to {path}")
    return int(counts["FAIL"] > 0)


if __name__ == "__main__":
    sys.exit(main())
