"""What a plot is: the part of a story that says what goes wrong and how it is put right.

A plot says which places suit it, which parts of the tree it makes likelier (with the place, this is what makes
concepts co-occur), and its acts: the roles in order, each with the probability that the story has it. `@` after a role
stands for the variant, `.out` or `.in`, that fits the place.
"""

from dataclasses import dataclass, field

Acts = tuple[tuple[str, float], ...]

BEGINNING: Acts = (("opening", 1.0), ("about", 0.4), ("setting@", 1.0), ("aside@", 0.45))
END: Acts = (("feel_good", 0.8), ("ending", 1.0))


@dataclass(frozen=True)
class Plot:
    """A plot.

    Args:
        frames: that only it uses, by their roles.
        middle: its acts between beginning and end.
        places: nodes of the tree under which its place lies.
        boosts: multiply a concept's weight among its siblings.
    """

    frames: dict[str, tuple[str, ...]]
    middle: Acts
    places: tuple[str, ...] = ("place",)
    boosts: dict[str, float] = field(default_factory=dict)

    @property
    def acts(self) -> Acts:
        """(role, probability) in order: the common beginning, the plot's own acts, the common end."""
        return BEGINNING + self.middle + END
