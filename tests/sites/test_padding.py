"""What is known of a batch's padding: the same activations to the bit, and no pass that waits for a GPU."""

import threading

import pytest
import torch
from pretended_cuda import DEVICE, pretended_cuda
from tiny_models import DECODERS, ENCODERS, build, tiny
from torch import Tensor
from transformers import PreTrainedModel, masking_utils

from hf_msae.sites import capture, padding, resolve_site
from hf_msae.sites.padding import known_padding

IDS = torch.tensor([[1, 5, 9, 33, 8, 60], [1, 17, 3, 3, 42, 7], [1, 4, 11, 29, 50, 6]])
LENGTHS = torch.tensor([6, 4, 3])[:, None]
RIGHT = torch.arange(6) < LENGTHS
MASKS = {"full": None, "padded": RIGHT.long(), "padded on the left": RIGHT.flip(1).long()}
# The CPU counts no integers in a histogram, by which their experts are found.
OF_EXPERTS = {"gpt_oss", "mixtral"}
# In some versions of transformers they ask for something of their own: a list as an index, a constant on the CPU, a
# mask that hides nothing.
WAITING = {"bloom", "falcon", "gpt_neo", "gptj", "mpnet", "mpt", "opt"}


def inputs_of(mask: Tensor | None, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    given = {"input_ids": IDS} if mask is None else {"input_ids": IDS * mask, "attention_mask": mask}
    return {name: tensor.to(device) for name, tensor in given.items()}


def captured(model: PreTrainedModel, **inputs: Tensor) -> Tensor:
    (hidden,) = capture(model, [resolve_site(model, "layers.1")], **inputs).values()
    return hidden


@pytest.mark.parametrize("padded", MASKS)
@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS])
def test_activations_are_the_same_to_the_bit(name: str, padded: str) -> None:
    model, inputs = tiny(name), inputs_of(MASKS[padded])
    plain = captured(model, **inputs)
    with known_padding(MASKS[padded] is not None):
        assert torch.equal(captured(model, **inputs), plain)


@pytest.mark.slow  # all operations pass through Python
@pytest.mark.parametrize("padded", ["full", "padded"])
@pytest.mark.parametrize("name", sorted({*DECODERS, *ENCODERS} - OF_EXPERTS))
def test_a_pass_does_not_wait(name: str, padded: str) -> None:
    with pretended_cuda() as gpu:
        model, inputs = build(name).to(DEVICE), inputs_of(MASKS[padded], DEVICE)
        captured(model, **inputs)  # asks for the layout, once a site
        gpu.clear()
        captured(model, **inputs)
        plain = gpu.syncs
        gpu.clear()
        with known_padding(MASKS[padded] is not None):
            captured(model, **inputs)
    if name in WAITING:
        assert len(gpu.syncs) <= len(plain)
    else:
        assert gpu.syncs == [], [str(event) for event in gpu.syncs]
    if name in ("llama", "gpt2"):
        assert plain


def test_rows_with_positions_of_their_own_are_looked_at() -> None:
    """Positions that differ between rows may begin anew within one: there, attention must not cross."""
    model = tiny("llama")
    inputs = {"input_ids": IDS, "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]] * 3)}
    plain = captured(model, **inputs)
    with known_padding(False):
        assert torch.equal(captured(model, **inputs), plain)
    assert not torch.equal(captured(model, input_ids=IDS), plain)


def test_other_threads_are_answered_by_transformers() -> None:
    positions = torch.tensor([[0, 1, 0, 1]]).expand(2, -1)
    found: dict[str, Tensor | None] = {}

    def ask(who: str) -> None:
        found[who] = masking_utils.find_packed_sequence_indices(positions)

    with known_padding(True):
        ask("here")
        other = threading.Thread(target=ask, args=("there",))
        other.start()
        other.join()
    assert found["here"] is None
    assert found["there"].tolist() == [[0, 0, 1, 1]] * 2


def test_functions_are_transformers_own_again() -> None:
    places = [(place, name) for place, name, _ in padding._ANSWERS]
    before = [vars(place)[name] for place, name in places]
    with known_padding(True), known_padding(False):
        assert all(vars(place)[name] is not own for (place, name), own in zip(places, before, strict=True))
    assert [vars(place)[name] for place, name in places] == before


def test_a_version_without_a_function_asks_as_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    place, _, answer = padding._ANSWERS[0]
    monkeypatch.setattr(padding, "_ANSWERS", [*padding._ANSWERS, (place, "_of_another_version", answer)])
    with known_padding(True):
        assert not hasattr(place, "_of_another_version")
