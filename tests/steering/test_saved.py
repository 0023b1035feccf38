"""A steering as data: what was saved is what is loaded, beside its SAE, on disk and on the Hub."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi
from hypothesis import given
from hypothesis import strategies as st

from hf_msae.steering import (
    Gate,
    LatentEdit,
    PrefixEdit,
    Steering,
    SteeringError,
    load_steering,
    load_steerings,
    push_steering,
    save_steering,
    steer,
)

REPO = "tester/owls"
OWLS = Steering([LatentEdit(3, 2.5), LatentEdit(9, method="ablate")], "generated", "owls", "More owls.")
COARSE = Steering([PrefixEdit(0, keep_error=False, sae="l1")], slice(1, None), "coarse")


@pytest.fixture
def folder(tmp_path: Path, sae) -> Path:
    sae.save_pretrained(tmp_path)
    return tmp_path


gates = st.builds(
    Gate,
    st.integers(0, 10**6),
    st.floats(0, allow_nan=False, allow_infinity=False),
    st.sampled_from(["max", "absolute"]),
    st.sampled_from(["here", "after"]),
)
latent_edits = st.builds(
    LatentEdit,
    st.integers(0, 10**6),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from(["add", "clamp", "ablate", "scale"]),
    st.sampled_from(["max", "absolute", "norm"]),
    st.text(),
    gates | st.lists(gates),
)
prefix_edits = st.builds(PrefixEdit, st.integers(-5, 5), st.booleans(), st.text())
whole = st.none() | st.integers(-99, 99)
positions = st.sampled_from(["all", "prompt", "generated"]) | st.builds(
    slice, whole, whole, st.none() | st.integers(1, 9)
)


@given(st.builds(Steering, st.lists(latent_edits | prefix_edits), positions, st.text(), st.text()))
def test_json_gives_back_the_same(steering):
    assert Steering.from_dict(json.loads(json.dumps(steering.to_dict()))) == steering


def test_saved_ones_are_found_by_name_and_replaced(folder):
    assert save_steering(OWLS, folder) == folder / "steering.json"
    assert load_steering(folder) == OWLS
    before = sorted(path.name for path in folder.iterdir())
    save_steering(COARSE, folder)
    assert load_steerings(folder) == {"owls": OWLS, "coarse": COARSE}
    assert load_steering(folder, "coarse") == COARSE
    fewer = Steering([LatentEdit(3, 1.0)], name="owls")
    save_steering(fewer, folder)
    assert load_steerings(folder) == {"owls": fewer, "coarse": COARSE}
    assert sorted(path.name for path in folder.iterdir()) == before
    with pytest.raises(SteeringError, match="several steerings, so a name is needed; there are 'owls', 'coarse'"):
        load_steering(folder)
    with pytest.raises(SteeringError, match="no steering 'cats'; there are 'owls', 'coarse'"):
        load_steering(folder, "cats")


def test_it_steers_as_the_context_does(llama, sae):
    ids = torch.tensor([[1, 5, 9, 33]])
    with torch.no_grad(), steer(llama, sae, {3: 2.5}, positions=slice(1, None)):
        expected = llama(ids).logits
    with torch.no_grad(), Steering([LatentEdit(3, 2.5)], slice(1, None)).on(llama, sae):
        assert torch.equal(llama(ids).logits, expected)
    with torch.no_grad(), Steering().on(llama, sae):
        assert torch.equal(llama(ids).logits, llama(ids).logits)
        assert not torch.allclose(llama(ids).logits, expected, atol=1e-2)


def test_a_steering_is_saved_only_beside_an_sae(tmp_path):
    with pytest.raises(SteeringError, match="holds no SAE; a steering names latents"):
        save_steering(OWLS, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_mask_is_not_kept():
    with pytest.raises(SteeringError, match="a mask of positions belongs to one text"):
        Steering(positions=torch.ones(3).bool())


BROKEN: list[tuple[Any, str]] = [
    ("{", "no JSON that can be read"),
    ("[]", "TypeError"),
    ('{"version": 1}', "KeyError: 'steerings'"),
    ('{"version": 2, "steerings": []}', "it has version 2, later than 1: update hf_msae"),
    ('{"version": 1, "steerings": [{"strength": 2}]}', "unknown key 'strength'; a Steering has edits, positions"),
    ('{"version": 1, "steerings": [{"edits": [{"latent": 1, "x": 2}]}]}', "unknown key 'x'; a LatentEdit has latent"),
    ('{"version": 1, "steerings": [{"edits": [{"latent": 1.5}]}]}', "a latent is a whole number from 0, got 1.5"),
    ('{"version": 1, "steerings": [{"edits": [{"level": "a"}]}]}', "a level is a whole number"),
    ('{"version": 1, "steerings": [{"positions": "some"}]}', "positions must be 'all', 'prompt', 'generated'"),
]


@pytest.mark.parametrize(("text", "said"), BROKEN)
def test_a_file_that_is_something_else_is_refused_in_words(folder, text, said):
    (folder / "steering.json").write_text(text)
    with pytest.raises(SteeringError) as error:
        load_steering(folder)
    assert f"steering.json of {folder} cannot be read" in str(error.value)
    assert said in str(error.value)


def test_a_folder_without_one_is_refused(folder):
    with pytest.raises(SteeringError, match=r"has no steering\.json; save_steering writes one"):
        load_steering(folder)


# The Hub


def test_pushed_steerings_lie_beside_the_sae_and_are_loaded(hub, sae):
    sae.push_to_hub(REPO)
    url = push_steering(OWLS, REPO)
    assert url == f"{hub.endpoint}/{REPO}/commit/{HfApi().model_info(REPO).sha}"
    push_steering(COARSE, REPO, commit_message="Coarse")
    assert HfApi().list_repo_commits(REPO)[0].title == "Coarse"
    assert load_steerings(REPO) == {"owls": OWLS, "coarse": COARSE}
    assert json.loads(hub.files(REPO)["steering.json"])["version"] == 1
    other = Steering([LatentEdit(1, 1.0)], name="owls")
    push_steering(other, REPO, revision="main")
    assert load_steering(REPO, "owls") == other
    assert load_steering(REPO, "coarse", token=hub.read_token) == COARSE


def test_a_branch_keeps_its_own(hub, sae):
    sae.push_to_hub(REPO)
    HfApi().create_branch(REPO, branch="draft")
    push_steering(OWLS, REPO, revision="draft")
    push_steering(COARSE, REPO)
    push_steering(Steering([LatentEdit(1, 1.0)], name="one"), REPO, revision="draft")
    assert list(load_steerings(REPO, revision="draft")) == ["owls", "one"]
    assert list(load_steerings(REPO)) == ["coarse"]


def test_each_sae_of_a_collection_has_its_own(hub, sae):
    sae.push_to_hub(REPO, subfolder="l1")
    push_steering(OWLS, REPO, subfolder="l1")
    push_steering(COARSE, REPO)
    assert load_steering(REPO, subfolder="l1") == OWLS
    assert load_steering(REPO) == COARSE
    with pytest.raises(SteeringError, match=f"{REPO} has no SAE in l2; push the SAE first"):
        push_steering(OWLS, REPO, subfolder="l2")


def test_a_repo_that_is_not_there_or_has_none_is_told_in_words(hub, sae):
    with pytest.raises(SteeringError, match="there is no model repo tester/none"):
        push_steering(OWLS, "tester/none")
    with pytest.raises(SteeringError, match="there is no folder and no Hub repo tester/none"):
        load_steering("tester/none")
    sae.push_to_hub(REPO)
    with pytest.raises(SteeringError, match=f"{REPO} has no steering.json; push_steering makes one"):
        load_steering(REPO)


# Damaged and absurd files

NONSENSE = [None, True, -1, 0.5, math.nan, math.inf, 10**400, "x", "../x", [], [[3]], {}, {"a": 1}]


def places(value: object, path: tuple = ()) -> Iterator[tuple]:
    """Where something lies in JSON."""
    yield path
    for key, inner in (
        value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else ())
    ):
        yield from places(inner, (*path, key))


def test_a_damaged_file_is_read_or_refused_in_a_sentence(folder):
    """Each part gone, then replaced by each kind of nonsense. What is read can be written again and is the same."""
    save_steering(OWLS, folder)
    save_steering(COARSE, folder)
    path = folder / "steering.json"
    said = []
    whole = path.read_text()
    texts = ["", "[" * 100_000, "1" * 10_000, whole[:40]]
    for at in places(json.loads(whole)):
        for index, other in enumerate(["gone", *NONSENSE]):
            content: Any = [json.loads(whole)]
            inside = content
            for key in (0, *at)[:-1]:
                inside = inside[key]
            if index == 0 and at:
                del inside[at[-1]]
            else:
                inside[(0, *at)[-1]] = other
            texts.append(json.dumps(content[0]))
    for text in texts:
        path.write_text(text)
        try:
            found = load_steerings(folder)
        except SteeringError as error:
            said.append(str(error))
        else:
            for name, steering in found.items():
                assert Steering.from_dict(json.loads(json.dumps(steering.to_dict()))) == steering
                assert name == steering.name
    assert len(said) > len(texts) / 2
    assert all(f"steering.json of {folder} cannot be read" in words and len(words) < 700 for words in said)
    path.write_bytes(b"\xff{}")
    with pytest.raises(SteeringError, match="cannot be read"):
        load_steerings(folder)


@pytest.mark.parametrize("name", ["..", "../x", "/etc", "a/../.."])
def test_no_steering_is_read_beside_the_folder_that_was_named(folder, hub, sae, name):
    save_steering(OWLS, folder)
    (folder / "below").mkdir()
    sae.push_to_hub(REPO)
    hub.requests.clear()
    for source in (folder / "below", REPO):
        with pytest.raises(ValueError, match=r"The subfolder .* must be a path below"):
            load_steerings(source, subfolder=name)
    assert hub.requests == []
    with pytest.raises(ValueError, match=r"The subfolder .* must be a path below"):
        push_steering(OWLS, REPO, subfolder=name)
