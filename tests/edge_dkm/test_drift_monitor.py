"""What a camera's monitor says has moved, and recommends: on a made-up line whose parts, light and lens can be changed one by one."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from edge_dkm.contract import Metadata
from edge_dkm.drift.monitor import DriftMonitor, DriftState
from edge_dkm.drift.quality import Quality
from edge_dkm.drift.reference import Reference, describe, read_reference
from edge_dkm.drift.statistic import Sighting

DIM, CLUSTERS, RUN_IN = 12, 3, 1200
SCENE = np.kron(np.random.default_rng(9).uniform(0, 255, (8, 8)), np.ones((4, 4))).astype(np.float32)


class MadeUpLine:
    """Good parts around 0 with scatter 1 in every dimension; `light`, `focus`, `right_px`, `shift` and `foreign` change it."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self.light, self.focus, self.right_px, self.shift = 0.0, 0.0, 0, 0.0
        self.foreign, self.foreign_share = np.zeros(DIM), 0.0

    def part(self) -> Sighting:
        rng = self._rng
        z = rng.normal(0, 1, DIM) + self.shift
        if rng.random() < self.foreign_share:
            z = self.foreign + rng.normal(0, 0.3, DIM)
        score = float(np.linalg.norm(z) / 5.2)  # 1 % of good parts lie beyond 1
        noise = rng.normal(0, 2, SCENE.shape).astype(np.float32)
        light = 120 + self.light + rng.normal(0, 5)
        picture = np.roll(SCENE, self.right_px, axis=1) + noise
        quality = Quality(light, 40 + rng.normal(0, 2), 0.2, -1.5 + self.focus + rng.normal(0, 0.1), picture)
        return Sighting(z.astype(np.float32), int(rng.integers(CLUSTERS)), score, quality)


def made_up_reference(lot: int = 1) -> Reference:
    """Of 120 parts; those of a lot are all alike."""
    line = MadeUpLine(1)
    sightings = [part for _ in range(120 // lot) for part in [line.part()] * lot]
    return read(describe(sightings, np.arange(120) // lot, [0.4, 0.3, 0.3]))


def read(found: dict[str, Any], **others: Any) -> Reference:
    raw = {
        "dkm.reference_hist": json.dumps({"shares": [0.4, 0.3, 0.3], "novelty_quantiles": {}, "drift": found, **others})
    }
    return read_reference(
        cast(Metadata, SimpleNamespace(raw=raw, embed_dim=DIM, novelty={"groups": 40, "target_frr": 0.01}))
    )


def run(monitor: DriftMonitor, line: MadeUpLine, parts: int) -> DriftState:
    for _ in range(parts):
        part = line.part()
        monitor.observe(part, part.novelty_score > 1)
    return monitor.state()


@pytest.fixture(scope="module")
def reference() -> Reference:
    return made_up_reference()


@pytest.fixture
def monitor(reference: Reference) -> DriftMonitor:
    return DriftMonitor(reference, CLUSTERS, 1e6, RUN_IN)


def test_a_line_that_runs_as_it_was_trained_says_so(monitor: DriftMonitor) -> None:
    state = run(monitor, MadeUpLine(2), 2500)
    assert (state.n, state.moved, state.recommended, state.left, state.is_settled) == (2500, (), "none", (), True)
    assert state.shares == pytest.approx((1 / 3,) * 3, abs=0.1) and state.novelty_rate < 0.04
    assert state.shift is not None and state.shift < 0.2


def test_light_that_changes_nothing_for_the_model_is_said_and_nothing_recommended(monitor: DriftMonitor) -> None:
    line = MadeUpLine(3)
    line.light = 25.0
    state = run(monitor, line, 150)
    assert (state.moved, state.recommended) == (("light",), "none") and state.left == ("light+",)


@pytest.mark.parametrize(
    ("change", "moved"), [({"light": 25.0}, "light"), ({"focus": -1.0}, "focus"), ({"right_px": 6}, "position")]
)
def test_a_camera_that_moved_is_to_be_looked_at_first(
    monitor: DriftMonitor, change: dict[str, Any], moved: str
) -> None:
    line = MadeUpLine(4)
    line.shift = 1.5
    for name, value in change.items():
        setattr(line, name, value)
    state = run(monitor, line, 200)
    assert (state.moved, state.recommended) == ((moved,), "camera")


def test_parts_that_changed_a_little_before_a_good_camera_want_a_recentring(monitor: DriftMonitor) -> None:
    line = MadeUpLine(5)
    line.shift = 0.7
    state = run(monitor, line, 300)
    assert (state.moved, state.recommended) == ((), "recentre")
    assert state.shift == pytest.approx(0.7, abs=0.15)  # of each dimension, as is the scatter


def test_parts_that_changed_beyond_the_training_s_scatter_want_a_training(monitor: DriftMonitor) -> None:
    line = MadeUpLine(6)
    line.shift = 1.6
    assert run(monitor, line, 300).recommended == "retrain"


def test_another_kind_of_part_is_told_from_a_new_kind_of_defect(reference: Reference) -> None:
    seen = {}
    for share in (0.6, 0.05):
        line, monitor = MadeUpLine(7), DriftMonitor(reference, CLUSTERS, 1e6, RUN_IN)
        run(monitor, line, RUN_IN + 100)
        line.foreign, line.foreign_share = np.full(DIM, 3.0), share
        state = run(monitor, line, 1500)
        seen[share] = state.moved, state.recommended
    assert seen == {0.6: (("new_type",), "retrain"), 0.05: (("new_family",), "retrain")}


def test_novel_parts_that_are_unlike_each_other_are_no_family(monitor: DriftMonitor) -> None:
    line, rng = MadeUpLine(8), np.random.default_rng(8)
    run(monitor, line, RUN_IN + 100)
    line.foreign_share = 0.05
    for _ in range(1500):
        direction = rng.normal(0, 1, DIM)
        line.foreign = 12 * direction / np.linalg.norm(direction)
        run(monitor, line, 1)
    state = monitor.state()
    assert state.moved == () and "beyond-1.5+" in state.left and state.recommended == "retrain"


def test_a_class_of_two_per_cent_is_seen_only_against_the_line_s_own_beginning(reference: Reference) -> None:
    """The negative control: the reference alone, a hundred parts, cannot exclude such a class."""
    line = MadeUpLine(9)
    settled, alone = DriftMonitor(reference, CLUSTERS, 1e6, 3000), DriftMonitor(reference, CLUSTERS, 1e6, 10**6)
    run(settled, line, 3100)
    line.foreign, line.foreign_share = np.full(DIM, 3.0), 0.02
    assert run(settled, line, 2000).moved == ("new_family",)
    assert run(alone, line, 2000).left == ()


def test_what_is_over_is_taken_back_and_can_be_found_again(monitor: DriftMonitor) -> None:
    line = MadeUpLine(10)
    for light, moved in ((25.0, ("light",)), (0.0, ()), (25.0, ("light",))):
        line.light = light
        assert run(monitor, line, 1000).moved == moved


def test_a_drift_is_not_learned_as_the_line_s_own_beginning(monitor: DriftMonitor) -> None:
    line = MadeUpLine(11)
    line.light = 25.0
    state = run(monitor, line, RUN_IN)
    assert state.moved == ("light",) and not state.is_settled


def test_parts_without_a_picture_are_watched_for_the_rest(monitor: DriftMonitor) -> None:
    line = MadeUpLine(12)
    line.shift = 1.6
    for _ in range(200):
        monitor.observe(replace(line.part(), quality=None), True)
    assert monitor.state().recommended == "retrain"


def test_lots_of_parts_that_are_alike_are_tested_as_one_part_each(reference: Reference) -> None:
    lots = made_up_reference(lot=5)
    assert (reference.block, reference.groups, lots.block, lots.groups) == (1, 120, 5, 24)
    width = [high[0] - low[0] for low, high in (reference.interval(), lots.interval())]
    assert width[1] > 2 * width[0]  # sqrt(5), and Student's quantile of 24 lots


def test_groups_of_parts_that_differ_are_worth_nearly_as_many_parts() -> None:
    line = MadeUpLine(1)
    found = describe([line.part() for _ in range(400)], np.arange(400) // 5, [0.4, 0.3, 0.3])
    assert read(found).block <= 2 and read(found).groups == 80


def test_an_older_model_is_watched_for_what_it_holds() -> None:
    reference = read(
        {"version": 0}, novelty_quantiles={"0.05": 0.2, "0.25": 0.4, "0.5": 0.6, "0.75": 0.8, "0.95": 0.95, "0.99": 1.1}
    )
    assert reference.names == ("novelty", "beyond-1", "cluster-0", "cluster-1", "cluster-2") and reference.missing
    monitor, line = DriftMonitor(reference, CLUSTERS, 1e6, RUN_IN), MadeUpLine(13)
    for _ in range(200):
        monitor.observe(replace(line.part(), quality=None, novelty_score=3.0, cluster_id=2), True)
    state = monitor.state()
    assert {"novelty+", "beyond-1+", "cluster-2+"} <= set(state.left)
    assert (state.moved, state.recommended, state.shift) == ((), "retrain", None)


def test_a_model_without_any_reference_is_not_watched_and_does_not_fail() -> None:
    raw: dict[str, str] = {}
    bare = read_reference(cast(Metadata, SimpleNamespace(raw=raw, embed_dim=DIM, novelty={})))
    monitor = DriftMonitor(bare, CLUSTERS, 1e6, RUN_IN)
    state = run(monitor, MadeUpLine(14), 20)
    assert (state.left, state.recommended, state.n) == ((), "none", 20)


def test_a_station_s_own_codebook_leaves_only_the_promised_rate_of_the_reference(reference: Reference) -> None:
    own = DriftMonitor(reference.for_own_codebook(), CLUSTERS, 1e6, RUN_IN)
    line = MadeUpLine(15)
    line.light, line.shift = 25.0, 0.3  # as it was recentred for
    assert run(own, line, RUN_IN + 200).left == ()
    line.light = 0.0
    assert run(own, line, 300).moved == ("light",)
