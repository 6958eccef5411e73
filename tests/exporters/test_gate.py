from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest

from edge_dkm import Inspector
from exporters.gate import GateReport, Promise, Rates, execution_spread, false_rejects, judge
from tests.exporters.graphs import own
from tests.images import draw

RNG = np.random.default_rng(0)
IMAGES = [draw(kind, RNG, 32) for _ in range(10) for kind in ("disc", "square", "bars")]
FRAMES = own(IMAGES, [n // 3 for n in range(30)])
PASSED = GateReport(1000, 0.999, {0: 1.0, 2: 0.99}, (), 0.995, 0.01, Rates(0.05, 0.04, 0.02, 0.08), 2.0, None)


def nudged(path: Path, name: str, change: object) -> Inspector:
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.name == name:
            tensor.CopyFrom(onnx.numpy_helper.from_array(change(onnx.numpy_helper.to_array(tensor)), name))  # type: ignore[operator]
    return Inspector(model.SerializeToString())


def test_a_report_within_all_limits_has_no_reasons() -> None:
    assert PASSED.reasons == [] and PASSED.worst_cluster == 2


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("agreement", 0.994, "ids agree on 99.40% of 1000 held-out frames, expected 99.5%"),
        ("cluster_agreement", {0: 1.0, 2: 0.97}, "ids agree on 97.00% of cluster 2, expected 98%"),
        ("unseen", (3, 5), "no held-out frame shows the clusters 3, 5"),
        ("spearman", 0.98, "correlate by 0.9800"),
        ("rates", Rates(0.05, 0.09, 0.02, 0.08), "is 9.00% (fp32: 5.00%), expected 2.00% to 8.00%"),
        ("rates", Rates(0.05, 0.01, 0.02, 0.08), "expected 2.00% to 8.00%"),
        ("too_slow", "it takes 1.00 times as long", "it takes 1.00 times as long"),
    ],
)
def test_each_limit_that_is_missed_is_a_reason(field: str, value: object, words: str) -> None:
    reasons = dataclasses.replace(PASSED, **{field: value}).reasons
    assert len(reasons) == 1 and words in reasons[0]


def test_a_graph_agrees_with_itself_and_is_not_faster_than_itself(tiny_model_path: Path) -> None:
    with Inspector(tiny_model_path) as one, Inspector(tiny_model_path) as two:
        report = judge(one, two, FRAMES, None)
    assert (report.agreement, set(report.cluster_agreement.values()), report.rates) == (1.0, {1.0}, None)
    assert (report.spearman, report.score_gap, report.frames) == (1.0, 0.0, 30)


def test_a_graph_with_other_centroids_is_caught(tiny_model_path: Path) -> None:
    with Inspector(tiny_model_path) as one, nudged(tiny_model_path, "centroids", lambda c: c[::-1].copy()) as other:
        report = judge(one, other, FRAMES, None)
    assert report.agreement < 0.7 and any("ids agree" in reason for reason in report.reasons)


def test_a_cluster_that_no_frame_shows_cannot_pass(tiny_model_path: Path) -> None:
    with Inspector(tiny_model_path) as one, Inspector(tiny_model_path) as two:
        report = judge(one, two, FRAMES[::3], None)  # discs alone
    assert report.unseen and any("no held-out frame shows" in reason for reason in report.reasons)


def test_a_graph_with_another_scale_rejects_too_much(tiny_model_path: Path) -> None:
    with Inspector(tiny_model_path) as one, nudged(tiny_model_path, "novelty_scale", lambda s: s / 100) as strict:
        report = judge(one, strict, FRAMES, Promise(0.1, 20))
    assert report.rates is not None and report.rates.int8 == pytest.approx(1.0) and report.rates.fp32 < 0.9
    assert any("false-reject rate" in reason for reason in report.reasons)


def test_scores_that_no_longer_rank_are_a_reason_and_no_nan(tiny_model_path: Path) -> None:
    with (
        Inspector(tiny_model_path) as one,
        nudged(tiny_model_path, "cluster_radius", lambda r: r * 1e30) as flat,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("error")
        report = judge(one, flat, FRAMES, None)
    assert not np.isnan(report.spearman) and np.isfinite(report.score_gap)


def test_the_rate_counts_groups_and_the_interval_is_that_of_the_promise() -> None:
    scores = np.array([[0.5, 2.0], [0.5, 0.5], [0.5, 0.5], [0.5, 0.5], [2.0, 2.0]])
    frames, ids = own([np.zeros((1, 1, 3), np.uint8)] * 5, [0, 0, 1, 1, 2]), np.zeros(5, np.int64)
    rates = false_rejects(scores, ids, frames, Promise(0.1, 99))
    assert rates is not None
    assert rates.int8 == pytest.approx((0.5 + 0 + 1) / 3)  # half of group 0, none of 1, all of 2
    assert rates.fp32 == pytest.approx(1 / 3)
    assert (rates.low, rates.high) == (0.0, pytest.approx(2 / 3))  # three of three at 10 %: once in a thousand times
    strangest = false_rejects(scores, ids, frames, Promise(0.1, 99, "group"))
    assert strangest is not None and strangest.int8 == pytest.approx(2 / 3)  # a group counts by its strangest part
    assert false_rejects(scores, ids, frames, None) is None


def test_rejected_clusters_and_parts_that_are_not_good_are_no_false_rejects() -> None:
    scores = np.array([[2.0, 2.0], [0.5, 0.5]])
    frames = own([np.zeros((1, 1, 3), np.uint8)] * 2)
    rates = false_rejects(scores, np.array([1, 0]), frames, Promise(0.1, 99, rejected=frozenset({1})))
    assert rates is not None and rates.int8 == 0.0
    defects = own([np.zeros((1, 1, 3), np.uint8)] * 2, is_good=False)
    assert false_rejects(scores, np.array([1, 0]), defects, Promise(0.1, 99)) is None


def test_two_ways_of_running_an_fp32_graph_differ_by_rounding_alone(tiny_model_path: Path) -> None:
    assert execution_spread(onnx.load(tiny_model_path), IMAGES[:5]) < 1e-4
