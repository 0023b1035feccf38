"""Texts for tests of `hf_msae.concepts`."""

from collections.abc import Sequence

import torch


def texts_of(words: Sequence[int], count: int, seed: int, always: Sequence[int] = ()) -> list[str]:
    """Different texts of ten words w<index>, drawn from some; two of them are from `always`, where it is given."""
    generator = torch.Generator().manual_seed(seed)

    def draw(pool: Sequence[int], number: int) -> list[int]:
        return [pool[place] for place in torch.randint(len(pool), (number,), generator=generator).tolist()]

    found = []
    for _ in range(count):
        row = [*draw(words, 8), *draw(always or words, 2)]
        order = torch.randperm(10, generator=generator).tolist()
        found.append(" ".join(f"w{row[place]}" for place in order))
    return found
