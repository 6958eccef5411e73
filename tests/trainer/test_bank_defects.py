from __future__ import annotations

import numpy as np
import pytest

from tests.images import draw
from trainer.bank import defects
from trainer.bank.defects import KINDS, with_defect


def pictures(side_px: int = 64) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return draw("disc", rng, side_px), draw("square", rng, side_px)


def test_a_defect_can_be_seen_and_most_of_the_picture_stays() -> None:
    image, other = pictures()
    changed = [with_defect(image, other, np.random.default_rng(seed)) for seed in range(60)]
    shares = [float((np.abs(one.astype(int) - image).max(2) > 3).mean()) for one in changed]
    assert min(shares) > 0 and np.median(shares) < 0.25
    assert all(one.shape == image.shape and one.dtype == np.uint8 for one in changed)


def test_the_good_picture_itself_is_not_touched_and_the_same_seed_draws_the_same() -> None:
    image, other = pictures()
    before = image.copy()
    first = with_defect(image, other, np.random.default_rng(3))
    assert np.array_equal(image, before)
    assert np.array_equal(first, with_defect(image, other, np.random.default_rng(3)))
    assert not np.array_equal(first, with_defect(image, other, np.random.default_rng(4)))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("size", [(8, 8, 1), (33, 64, 3)])
def test_every_kind_works_on_small_and_oblong_pictures(
    monkeypatch: pytest.MonkeyPatch, kind: defects.Kind, size: tuple[int, ...]
) -> None:
    monkeypatch.setattr(defects, "KINDS", (kind,))
    rng = np.random.default_rng(1)
    image, other = (rng.integers(60, 200, size, dtype=np.uint8) for _ in range(2))
    for _ in range(20):
        changed = with_defect(image, other, rng)
        assert changed.shape == size and not np.array_equal(changed, image)
