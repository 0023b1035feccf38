"""The curves of a run as a picture."""

import io
from typing import Any

import numpy as np
import pytest

from hf_msae.hub.curves import draw_curves, fve_by_level

pytestmark = pytest.mark.slow

pytest.importorskip("matplotlib", reason="pictures of curves need matplotlib")

SIZES = [8, 64]


def make_log(losses: list[float], **changes: Any) -> list[dict[str, Any]]:
    values = {"aux_loss": 0.1, "l0": 4.0, "dead": 0.25, "level_losses": [0.5, 0.125]}
    return [
        {"step": step, "tokens": 1000 * step, "loss": loss, **values, **changes}
        for step, loss in enumerate(losses, start=1)
    ]


def read_png(png: bytes) -> np.ndarray:
    """Red, green, blue and alpha, (height, width, 4), from 0 to 1."""
    from matplotlib.image import imread

    return imread(io.BytesIO(png), format="png")


def test_it_is_a_transparent_picture_with_something_drawn() -> None:
    pixels = read_png(draw_curves(make_log([1.0, 0.5, 0.25]), SIZES))
    height, width, channels = pixels.shape
    assert (height, width, channels) == (594, 990, 4)
    assert float(pixels[0, 0, 3]) == 0.0
    assert 0.01 < float((pixels[..., 3] > 0.5).mean()) < 0.3


def test_what_is_drawn_reads_on_white_and_on_black() -> None:
    """WCAG asks for a contrast of 3 of what is large; (L1 + 0.05) / (L2 + 0.05) with relative luminances."""
    pixels = read_png(draw_curves(make_log([1.0, 0.5]), [8, 16, 32, 64, 128])).reshape(-1, 4)
    solid = pixels[pixels[:, 3] > 0.95][:, :3]
    linear = np.where(solid <= 0.04045, solid / 12.92, ((solid + 0.055) / 1.055) ** 2.4)
    luminance = linear @ np.array([0.2126, 0.7152, 0.0722])
    assert len(luminance) > 1000
    assert np.quantile(1.05 / (luminance + 0.05), 0.01) > 2
    assert np.quantile((luminance + 0.05) / 0.05, 0.01) > 2


def test_other_numbers_give_another_picture_and_the_same_numbers_the_same() -> None:
    assert draw_curves(make_log([1.0, 0.5, 0.3]), SIZES) == draw_curves(make_log([1.0, 0.5, 0.3]), SIZES)
    assert draw_curves(make_log([1.0, 0.5, 0.3]), SIZES) != draw_curves(make_log([1.0, 0.9, 0.3]), SIZES)


def test_a_run_too_short_for_a_curve_has_none() -> None:
    assert draw_curves(make_log([1.0]), SIZES) is None
    assert draw_curves([], SIZES) is None


def test_fve_is_what_the_errors_leave() -> None:
    assert fve_by_level(make_log([1.0, 0.5]), SIZES) == ([1000, 2000], [[0.5, 0.875], [0.5, 0.875]])


def test_where_prefixes_are_sampled_fve_is_what_was_measured_in_passing() -> None:
    log = [{key: value for key, value in entry.items() if key != "level_losses"} for entry in make_log([1.0, 0.5])]
    log.append({"step": 2, "tokens": 2000, "eval_levels": [{"prefix": 8, "fve": 0.25}, {"prefix": 64, "fve": 0.75}]})
    assert fve_by_level(log, SIZES) == ([2000], [[0.25, 0.75]])
    assert draw_curves(log, SIZES) is not None


def test_without_levels_the_other_curves_are_drawn() -> None:
    log = [{key: value for key, value in entry.items() if key != "level_losses"} for entry in make_log([1.0, 0.5])]
    assert fve_by_level(log, SIZES) == ([], [])
    assert read_png(draw_curves(log, SIZES)).shape == (594, 990, 4)
