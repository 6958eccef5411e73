"""Each measure of a picture follows what it is named for, and nothing else."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from edge_dkm.drift.quality import THUMBNAIL_PX, Quality, measure, offset


def scene(seed: int = 0, side_px: int = 128) -> np.ndarray:
    """Edges and fine texture between 30 and 180 (..., 3)."""
    rng = np.random.default_rng(seed)
    blocks = np.kron(rng.uniform(40, 160, (8, 8)), np.ones((side_px // 8, side_px // 8)))
    grey = np.clip(blocks + rng.normal(0, 8, blocks.shape), 30, 180)
    return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2)


def test_a_flat_picture_by_hand() -> None:
    quality = measure(np.full((40, 60, 3), 77, np.uint8))
    assert (quality.light, quality.contrast, quality.burnt, quality.focus) == (77, 0, 0, 0)
    assert quality.thumbnail.shape == (THUMBNAIL_PX, THUMBNAIL_PX) and np.all(quality.thumbnail == 77)


def test_stripes_by_hand() -> None:
    """Columns 0 0 100 100: neighbours differ in half of the places, pixels four apart nowhere; rows never differ."""
    stripes = np.tile(np.repeat(np.array([0, 100], np.uint8), 2), (32, 16))
    quality = measure(stripes)
    assert (quality.light, quality.contrast) == (50, 50)
    near = 31 * 100**2 / 63
    assert quality.focus == pytest.approx(np.log((near + 1e-3) / 1e-3))


def test_light_moves_light_and_not_focus() -> None:
    before, after = measure(scene()), measure(cv2.convertScaleAbs(scene(), alpha=1.2))
    assert after.light == pytest.approx(1.2 * before.light, rel=0.01)
    assert after.contrast == pytest.approx(1.2 * before.contrast, rel=0.01)
    assert after.focus == pytest.approx(before.focus, abs=0.01)


def test_blur_moves_focus_and_not_light() -> None:
    before, after = measure(scene()), measure(cv2.GaussianBlur(scene(), (0, 0), 1.0))
    assert after.light == pytest.approx(before.light, abs=0.5)
    assert after.focus < before.focus - 0.5


def test_light_burns_the_texture_out_of_a_white_surface() -> None:
    rng = np.random.default_rng(1)
    white = rng.integers(243, 256, (64, 64, 3)).astype(np.uint8)
    before, after = measure(white), measure(cv2.convertScaleAbs(white, alpha=1.2))
    assert before.burnt < 0.2 and after.burnt == 1.0


@pytest.mark.parametrize(("right_px", "down_px"), [(0, 0), (12, 0), (0, -8), (8, 4)])
def test_a_moved_picture_is_measured_in_shares_of_its_size(right_px: int, down_px: int) -> None:
    rng = np.random.default_rng(2)
    part = np.full((128, 128, 3), 40, np.uint8)
    cv2.rectangle(part, (44, 50), (84, 80), (200, 200, 200), -1)
    cv2.circle(part, (60, 64), 6, (10, 10, 10), -1)
    part = np.clip(part + rng.normal(0, 3, part.shape), 0, 255).astype(np.uint8)
    moved = np.roll(part, (down_px, right_px), axis=(0, 1))
    found = offset(measure(moved).thumbnail, measure(part).thumbnail)
    assert found == pytest.approx((right_px / 128, down_px / 128), abs=0.01)


def test_pictures_without_anything_in_them_have_not_moved() -> None:
    flat = np.zeros((THUMBNAIL_PX, THUMBNAIL_PX), np.float32)
    assert offset(flat, flat) == (0.0, 0.0)


@pytest.mark.parametrize("shape", [(1, 1, 3), (3, 500, 3), (7, 7)])
def test_a_tiny_picture_is_measured_too(shape: tuple[int, ...]) -> None:
    quality = measure(np.full(shape, 9, np.uint8))
    assert isinstance(quality, Quality) and (quality.light, quality.focus) == (9, 0)


def test_grey_and_colour_of_one_picture_agree() -> None:
    colour, grey = measure(scene()), measure(np.ascontiguousarray(scene()[..., 0]))
    assert (colour.light, colour.focus) == (grey.light, grey.focus)
