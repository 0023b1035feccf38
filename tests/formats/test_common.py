"""What every format's reader and writer rests on."""

import re

import pytest
import torch

from hf_msae.formats.common import (
    Files,
    FormatError,
    chosen_prefix_sizes,
    complete_state,
    peek_json,
    read_json,
    refuse_many,
    single_level,
    target_k,
)


@pytest.fixture
def tensors(random_weights):
    weights = random_weights()
    return {
        "W_enc": weights["W_enc"].T,
        "W_dec": weights["W_dec"],
        "b_enc": weights["b_enc"],
        "b_dec": weights["b_dec"],
    }


class TestCompleteState:
    def test_transposed_views_get_memory_of_their_own(self, tmp_path, tensors):
        state = complete_state(Files(tmp_path), tensors)
        assert state["W_enc"].is_contiguous()
        assert torch.equal(state["W_enc"], tensors["W_enc"])
        state["W_dec"].zero_()
        assert tensors["W_dec"].any()

    @pytest.mark.parametrize("shape", [(), (1,)])
    def test_one_threshold_serves_all_latents(self, tmp_path, tensors, shape):
        state = complete_state(Files(tmp_path), tensors | {"threshold": torch.full(shape, 0.25, dtype=torch.float64)})
        assert torch.equal(state["threshold"], torch.full((40,), 0.25))

    def test_thresholds_below_zero_become_zero(self, tmp_path, tensors):
        threshold = torch.linspace(-1, 1, 40)
        state = complete_state(Files(tmp_path), tensors | {"threshold": threshold})
        assert torch.equal(state["threshold"], threshold.clamp_min(0))

    def test_tensors_of_another_shape_are_named(self, tmp_path, tensors):
        with pytest.raises(FormatError, match=r"hidden size 12, b_dec should be \(12,\), but is \(40,\)"):
            complete_state(Files(tmp_path), tensors | {"b_dec": torch.zeros(40)})
        with pytest.raises(FormatError, match=r"encoder of .* is torch.float32 of shape \(40,\); expected a matrix"):
            complete_state(Files(tmp_path), tensors | {"W_enc": torch.zeros(40)})


class TestPrefixSizes:
    def test_recorded_given_and_neither(self, tmp_path):
        files = Files(tmp_path)
        assert chosen_prefix_sizes([8, 40], None, 40, files, []) == [8, 40]
        assert chosen_prefix_sizes(None, [8, 20], 40, files, []) == [8, 20, 40]
        with pytest.raises(FormatError, match=r"do not say at which sizes it is nested\. Give prefix_sizes"):
            chosen_prefix_sizes(None, None, 40, files, [])
        with pytest.raises(FormatError, match=r"records the prefix sizes \[8, 40\], but \[9\] were given"):
            chosen_prefix_sizes([8, 40], [9], 40, files, [])

    def test_a_plain_sae_is_one_level_and_says_so(self, tmp_path):
        notes = []
        assert single_level(None, 40, Files(tmp_path), notes) == [40]
        assert "Nesting is not recorded" in notes[0]
        assert single_level([10], 40, Files(tmp_path), notes) == [10, 40]
        assert len(notes) == 1


@pytest.mark.parametrize(("reported", "k"), [(17, 17), (0.5, 0.5), (0, 32), (None, 32), ("9", 32), (41, 32)])
def test_target_k(reported, k):
    notes = []
    assert target_k(reported, 40, notes) == k
    assert len(notes) == (k == 32)


@pytest.mark.parametrize("count", [1, 40, 120])
def test_folders_are_named_in_the_order_of_their_layers_a_hundred_of_them(tmp_path, count):
    for index in range(count):
        (tmp_path / f"layers.{index}").mkdir()
        (tmp_path / f"layers.{index}" / "w.bin").touch()
    names = ", ".join(f"layers.{index}" for index in range(min(count, 100)))
    more = r" and 20 more" if count == 120 else ""
    with pytest.raises(FormatError, match=rf"holds {count} X checkpoint.*: {re.escape(names)}{more}\."):
        refuse_many(Files(tmp_path), "w.bin", "X")
    refuse_many(Files(tmp_path, subfolder="layers.0"), "w.bin", "X")


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[1]"])
def test_json_that_is_no_object(tmp_path, content):
    (tmp_path / "c.json").write_bytes(content)
    assert peek_json(Files(tmp_path), "c.json") == {}
    with pytest.raises(FormatError, match=r"c\.json of .* (is no JSON that can be read|should hold an object)"):
        read_json(Files(tmp_path), "c.json")
