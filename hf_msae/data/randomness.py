"""Random orders that are pure functions of numbers."""

import hashlib

import torch


def seeded_generator(*numbers: int) -> torch.Generator:
    """A CPU generator (the same numbers on every device) whose seed mixes all of `numbers`.

    A hash rather than a sum: neighbouring seeds and shards must not share the permutations of neighbouring blocks.
    """
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))
