"""Steering on a pretended GPU: a token that is written waits for nothing but what `generate` itself waits for."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from pretended_cuda import DEVICE, PretendedCuda, pretended_cuda
from steered_runs import IDS
from tiny_models import build, tiny
from torch import Tensor
from transformers import PreTrainedModel

from hf_msae import MatryoshkaSAE
from hf_msae.steering import Gate, random_direction, seeded_sampling, steer, steer_direction

pytestmark = pytest.mark.slow  # all operations pass through Python

Steering = Callable[[PreTrainedModel, MatryoshkaSAE], AbstractContextManager[None]]
# With more special tokens than a GPU compares one by one.
STEERINGS: dict[str, Steering] = {
    "add": lambda model, sae: steer(model, sae, {3: 2.0}),
    "clamp, in norms": lambda model, sae: steer(model, sae, {3: 2.0}, method="clamp", units="norm"),
    "ablate": lambda model, sae: steer(model, sae, [3, 4], method="ablate"),
    "prefix": lambda model, sae: steer(model, sae, method="prefix", level=0),
    "gate": lambda model, sae: steer(model, sae, {3: 2.0}, when=Gate(4)),
    "gate, later": lambda model, sae: steer(model, sae, {3: 2.0}, when=Gate(4, then="after")),
    "prompt": lambda model, sae: steer(model, sae, {3: 2.0}, positions="prompt"),
    "generated": lambda model, sae: steer(model, sae, {3: 2.0}, positions="generated"),
    "slice": lambda model, sae: steer(model, sae, {3: 2.0}, positions=slice(-2, None)),
    "many special tokens": lambda model, sae: steer(model, sae, {3: 2.0}, special_ids=range(40, 64)),
    "direction": lambda model, sae: steer_direction(model, random_direction("layers.1", 32), 3.0),
}


@pytest.fixture
def gpu() -> Iterator[PretendedCuda]:
    with pretended_cuda() as device:
        yield device


def write(model: PreTrainedModel, num_tokens: int, **options: Any) -> Tensor:
    ids = IDS.to(model.device)
    mask = torch.ones_like(ids)
    limits = {"max_new_tokens": num_tokens, "min_new_tokens": num_tokens, "pad_token_id": 0}
    return model.generate(input_ids=ids, attention_mask=mask, do_sample=False, **limits, **options)


def waits_of_a_token(gpu: PretendedCuda, model: PreTrainedModel, sampled: bool) -> Counter[str]:
    """What each token after the first three waits for, over four of them."""
    counts = []
    for num_tokens in (3, 7):
        options = {"logits_processor": seeded_sampling(1)} if sampled else {}
        gpu.clear()
        write(model, num_tokens, **options)
        counts.append(Counter(map(str, gpu.syncs)))
    return counts[1] - counts[0]


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", STEERINGS)
def test_a_token_waits_for_nothing_more_than_without_steering(gpu, make_sae, name: str, sampled: bool) -> None:
    sae = make_sae(tiny("llama"), norm_limit=1e4).to(DEVICE)
    model = build("llama").to(DEVICE)
    plain = waits_of_a_token(gpu, model, sampled=False)
    assert sum(plain.values()) >= 4  # whether all texts have ended
    with STEERINGS[name](model, sae):
        assert waits_of_a_token(gpu, model, sampled) == plain


@pytest.mark.parametrize("name", STEERINGS)
def test_the_text_is_that_of_the_cpu(gpu, make_sae, name: str) -> None:
    sae, here = make_sae(tiny("llama"), norm_limit=1e4), tiny("llama")
    with STEERINGS[name](here, sae):
        expected = write(here, 6)
    there = build("llama").to(DEVICE)
    with STEERINGS[name](there, sae.to(DEVICE)):
        assert torch.equal(write(there, 6).cpu(), expected)
