"""Names go on being importable for a version from where they were, with a warning that says where they are now."""

import importlib

import pytest

MOVED = [
    ("hf_msae.evaluation", "Recovery", "hf_msae.research.recovery"),
    ("hf_msae.evaluation", "measure_recovery", "hf_msae.research.recovery"),
    ("hf_msae.evaluation.hedging", "measure_hedging", "hf_msae.research.hedging"),
    ("hf_msae.evaluation.meta", "train_meta_sae", "hf_msae.research.meta"),
    ("hf_msae.evaluation.progressive", "measure_progressive", "hf_msae.research.progressive"),
    ("hf_msae.evaluation.stitching", "measure_stitching", "hf_msae.research.stitching"),
    ("hf_msae.worlds.features", "FeatureWorld", "hf_msae.research.toys"),
]


@pytest.mark.parametrize(("old", "name", "new"), MOVED)
def test_what_moved_is_still_found_where_it_was(old, name, new):
    with pytest.warns(DeprecationWarning, match=f"{old}.{name} is now {new}.{name}") as caught:
        exec(f"from {old} import {name}", found := {})
    assert found[name] is getattr(importlib.import_module(new), name)
    # At the line that imports it: Python shows such warnings only in the user's own file.
    assert caught[0].filename == "<string>"


@pytest.mark.parametrize("old", sorted({old for old, _, _ in MOVED}))
def test_a_name_that_never_was_is_an_error_as_in_any_module(old):
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        exec(f"from {old} import nothing")
