"""Novel parts that lie alike: a small new kind among many false rejects, and what must not be taken for one."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_dkm.contract import Metadata
from edge_dkm.drift.crowd import LAST, Crowd, Directions
from edge_dkm.drift.monitor import DriftMonitor
from edge_dkm.drift.quality import Quality
from edge_dkm.drift.reference import Reference, describe, read_reference
from edge_dkm.drift.statistic import Sighting

DIM, RUN_IN, FALSE_REJECTS = 32, 1000, 0.05
SETTLED = 3 * RUN_IN + 100  # the beginning of the line, and that of its crowds
SCENE = np.kron(np.random.default_rng(9).uniform(0, 255, (8, 8)), np.ones((4, 4))).astype(np.float32)
AXES = np.eye(DIM, dtype=np.float32) * 9


class Line:
    """Good parts around 0, 5 % of them false rejects that lie anywhere; `family` comes as `share` of the parts, about a place of its own.

    focus, shift: added to the picture's measure, and to every embedding.
    """

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self.family: NDArray[np.float32] | None = None
        self.share = self.focus = self.shift = 0.0
        self.has_noise = True

    def embedding(self) -> tuple[NDArray[np.float32], bool]:
        """And whether it is novel."""
        rng = self._rng
        if self.family is not None and rng.random() < self.share:
            return (self.family + self.has_noise * rng.normal(0, 0.8, DIM)).astype(np.float32), True
        z = rng.normal(0, 1, DIM) + self.shift
        return z.astype(np.float32), bool(rng.random() < FALSE_REJECTS)

    def part(self) -> Sighting:
        rng = self._rng
        embedding, is_novel = self.embedding()
        score = 1.1 if is_novel else rng.uniform(0.2, 0.99)
        picture = SCENE + rng.normal(0, 2, SCENE.shape).astype(np.float32)
        quality = Quality(
            120 + rng.normal(0, 5), 40 + rng.normal(0, 2), 0.2, -1.5 + self.focus + rng.normal(0, 0.1), picture
        )
        return Sighting(embedding, 0, score, quality)


@pytest.fixture(scope="module")
def reference() -> Reference:
    line = Line(1)
    found = describe([line.part() for _ in range(200)], np.arange(200), [1.0])
    metadata = SimpleNamespace(raw={"dkm.reference_hist": json.dumps({"drift": found})}, embed_dim=DIM, novelty={})
    return read_reference(cast(Metadata, metadata))


def run(monitor: DriftMonitor, line: Line, parts: int) -> None:
    for _ in range(parts):
        part = line.part()
        monitor.observe(part, part.novelty_score > 1)


def words(monitor: DriftMonitor, line: Line, parts: int) -> Iterator[tuple[str, ...]]:
    """What is said to have moved, as often as a line looks, then what is recommended."""
    for _ in range(parts // 8):
        run(monitor, line, 8)
        yield monitor.state().moved
    yield (monitor.state().recommended,)


@pytest.fixture(scope="module")
def after_run_ins(reference: Reference) -> DriftMonitor:
    monitor = DriftMonitor(reference, 1, 1e6, RUN_IN)
    run(monitor, Line(2), SETTLED)
    assert monitor.state().left == ()
    return monitor


@pytest.fixture
def monitor(after_run_ins: DriftMonitor) -> DriftMonitor:
    """That knows its line's beginning."""
    return copy.deepcopy(after_run_ins)


def bare(run_in: int = RUN_IN, block: int = 1) -> Crowd:
    return Crowd(np.zeros(DIM, np.float32), block, 1e6, 1, run_in)


def parts_until_left(crowd: Crowd, line: Line, parts: int) -> int | None:
    for n in range(parts):
        crowd.observe(*line.embedding(), is_beginning=True)
        if crowd.left_for is not None:
            return n
    return None


def test_a_family_of_two_per_cent_among_false_rejects_is_named_and_wants_a_training(monitor: DriftMonitor) -> None:
    line = Line(12)
    line.family, line.share = AXES[0], 0.02
    run(monitor, line, 1800)
    state = monitor.state()
    assert (state.moved, state.recommended) == (("new_family",), "retrain")
    assert state.left == ("crowd+",)  # how many are novel tells nothing yet
    line.share = 0.0
    run(monitor, line, 1500)
    assert monitor.state().left == ()


def test_as_many_more_novel_parts_that_lie_anywhere_are_no_family() -> None:
    crowd, line, rng = bare(), Line(2), np.random.default_rng(2)
    assert parts_until_left(crowd, line, SETTLED) is None
    line.share = 0.02
    for _ in range(5000):
        direction = rng.normal(0, 1, DIM)
        line.family = (9 * direction / np.linalg.norm(direction)).astype(np.float32)
        assert parts_until_left(crowd, line, 1) is None


def test_false_rejects_alone_never_crowd_however_long_a_line_runs() -> None:
    crowd, line = bare(), Line(3)
    assert parts_until_left(crowd, line, 40_000) is None
    line.family, line.share = AXES[0], 0.02
    assert parts_until_left(crowd, line, 2000) is not None


def test_a_kind_of_novel_part_that_the_beginning_had_is_not_new_but_another_is() -> None:
    crowd, line = bare(), Line(4)
    line.family, line.share = AXES[0], 0.02
    assert parts_until_left(crowd, line, 20_000) is None
    line.family = AXES[1]
    assert parts_until_left(crowd, line, 2000) is not None


@pytest.mark.parametrize(("focus", "said"), [(-0.07, "focus"), (0.0, "new_family")])
def test_novel_parts_that_crowd_before_a_blur_is_sure_are_the_camera_s(
    monitor: DriftMonitor, focus: float, said: str
) -> None:
    """Some 150 parts before. The negative control: the same parts, with the picture as it was."""
    line = Line(5)
    line.family, line.share, line.focus = AXES[0], 0.06, focus
    *moved, recommended = words(monitor, line, 1200)
    assert set(moved) == {(), (said,)} and moved[-1] == (said,)
    assert recommended == ("camera" if focus else "retrain",)


def test_novel_parts_that_crowd_while_all_parts_shift_are_no_family(monitor: DriftMonitor) -> None:
    line = Line(6)
    line.family, line.share, line.shift = AXES[0], 0.06, 0.5
    *moved, recommended = words(monitor, line, 1200)
    assert "crowd+" in monitor.state().left
    assert set(moved[: 400 // 8]) == {()} and recommended == ("recentre",)


def test_a_picture_that_comes_again_and_again_is_one_part() -> None:
    crowds = {}
    for has_noise in (False, True):
        crowd, line = bare(), Line(7)
        parts_until_left(crowd, line, SETTLED)
        line.family, line.share, line.has_noise = AXES[0], 0.02, has_noise
        crowds[has_noise] = parts_until_left(crowd, line, 3000)
    assert crowds[False] is None and crowds[True] is not None


def test_what_has_drifted_already_is_no_beginning_of_crowds() -> None:
    drifted, learned, line = bare(), bare(), Line(8)
    for _ in range(SETTLED):
        embedding, is_novel = line.embedding()
        drifted.observe(embedding, is_novel, is_beginning=False)
        learned.observe(embedding, is_novel, is_beginning=True)
    line.family, line.share = AXES[0], 0.02
    assert parts_until_left(learned, line, 2000) is not None
    assert parts_until_left(drifted, line, 2000) is None  # it is learning now


def test_parts_of_a_lot_that_are_alike_are_compared_with_as_one() -> None:
    """The negative control: as parts of their own they crowd at once."""
    rates = {}
    for block in (1, 10):
        crowd, line = bare(run_in=20, block=block), Line(10)
        line.share = 1.0
        for n in range(40):
            line.family = AXES[0] if n < 20 else AXES[1]
            crowd.observe(*line.embedding(), is_beginning=True)
        rates[block] = crowd.rate
    assert rates[10] == 0.0 and rates[1] > 0.5


def test_only_the_last_directions_are_kept() -> None:
    directions, unit = Directions(LAST, DIM), np.eye(DIM, dtype=np.float32)
    near = np.array([1, 0.1, *[0] * (DIM - 2)], np.float32)
    near /= np.linalg.norm(near)
    for n in range(10 * LAST):
        directions.add(unit[0] if n < 9 * LAST + 4 else unit[1])
        assert len(directions) == min(n + 1, LAST)
    assert directions.alike(near).tolist() == [4, 4, 4]
    assert directions.alike(unit[0]).tolist() == [0, 0, 0]  # the same pictures
    assert directions._rows.shape == (LAST, DIM)
