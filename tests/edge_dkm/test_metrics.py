from __future__ import annotations

import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml

from edge_dkm.drift.monitor import DriftState
from edge_dkm.message import CameraCounters, OutboxHealth, StageHealth
from edge_dkm.service.histogram import INFER_S, NOVELTY, Histogram
from edge_dkm.service.metrics import CameraSnapshot, ClockJumps, Exporter, ModelRow, Snapshot

pytest.importorskip("prometheus_client")
from prometheus_client.parser import text_string_to_metric_families

DOCS = Path(__file__).parent.parent.parent / "docs"


def snapshot(**changes: Any) -> Snapshot:
    infer, novelty = Histogram((0.01, 0.1)), Histogram((1.0, 2.0))
    for seconds in (0.004, 0.01, 0.05, 7.0):
        infer.observe(seconds)
    novelty.observe(0.5)
    novelty.observe(1.5)
    counters = CameraCounters(frames=12, results=7, bad=2, dropped={"superseded": 2})
    top = CameraSnapshot(
        True, counters, {"completed": 6, "failed": 1, "bad_frame": 2}, infer.counts(), novelty.counts()
    )
    values: dict[str, Any] = {
        "version": "0.1.0",
        "uptime_s": 61.5,
        "cameras": {"top": top},
        "stages": {
            "infer": StageHealth(state="stuck", count=9, age_s=12.5),
            "mqtt": StageHealth(state="ok", count=7, age_s=0.1),
        },
        "restarts": {"cam:top": 2, "process": 1},
        "models": (ModelRow("top", "bracket-v7", "ab12", "base"),),
        "outbox": OutboxHealth(rows=5, bytes=2500, oldest_s=61.5),
        "outbox_dropped": {"top": {"drop_oldest": 3}},
        "pubacks": {0: 7, 0x97: 1},
        "ack_lag": 4,
        "is_connected": True,
        "disk_free_bytes": 123_000_000,
        "rss_bytes": 90_000_000,
        "clock_synced": False,
        "clock_jumps": 1,
        "drift": {"top": DriftState(90, (0.5, 0.5), 0.02, 0.4, ("light",), "camera", ("light+",), True)},
        "not_followed": 3,
    }
    return Snapshot(**{**values, **changes})


def samples(text: bytes) -> dict[str, float]:
    """`name{label="value"}` to value."""
    found = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()))
            found[sample.name + (f"{{{labels}}}" if labels else "")] = sample.value
    return found


def test_a_scrape_says_what_the_snapshot_holds() -> None:
    said = samples(Exporter(snapshot).text())
    assert {key: said[f"edge_dkm_{key}"] for key in EXPECTED} == EXPECTED


EXPECTED = {
    "frames_total{camera=top,outcome=result}": 7,
    "frames_total{camera=top,outcome=bad}": 2,
    "frames_total{camera=top,outcome=dropped}": 2,
    "frames_chosen_total{camera=top}": 12,
    "frames_under_way{camera=top}": 1,
    "results_total{camera=top,state=failed}": 1,
    "dropped_total{camera=top,reason=superseded}": 2,
    "outbox_dropped_total{camera=top,reason=drop_oldest}": 3,
    "outbox_rows": 5,
    "outbox_bytes": 2500,
    "outbox_oldest_seconds": 61.5,
    "outbox_blocked": 0,
    "puback_total{code=0x00}": 7,
    "puback_total{code=0x97}": 1,
    "ack_lag": 4,
    "broker_connected": 1,
    "stage_progress_seconds{stage=infer}": 12.5,
    "stage_stuck{stage=infer}": 1,
    "stage_stuck{stage=mqtt}": 0,
    "stage_restarts_total{stage=cam:top}": 2,
    "infer_seconds_bucket{camera=top,le=0.01}": 2,
    "infer_seconds_bucket{camera=top,le=0.1}": 3,
    "infer_seconds_bucket{camera=top,le=+Inf}": 4,
    "infer_seconds_count{camera=top}": 4,
    "infer_seconds_sum{camera=top}": 7.064,
    "novelty_score_bucket{camera=top,le=1.0}": 1,
    "model_info{camera=top,codebook=base,id=bracket-v7,sha256=ab12,version=0.1.0}": 1,
    "state_corrupt_total": 0,
    "clock_jumps_total": 1,
    "clock_synced": 0,
    "disk_free_bytes": 123e6,
    "rss_bytes": 90e6,
    "camera_online{camera=top}": 1,
}


def test_frames_chosen_are_results_bad_dropped_and_under_way() -> None:
    said = samples(Exporter(snapshot).text())
    outcomes = [n for key, n in said.items() if key.startswith("edge_dkm_frames_total")]
    assert (
        sum(outcomes) + said["edge_dkm_frames_under_way{camera=top}"]
        == said["edge_dkm_frames_chosen_total{camera=top}"]
    )
    states = sum(n for key, n in said.items() if key.startswith("edge_dkm_results_total"))
    assert states == said["edge_dkm_frames_total{camera=top,outcome=result}"] + 2


def test_control_a_frame_that_vanished_shows_as_under_way_for_ever_and_one_counted_twice_below_zero() -> None:
    def under_way(**counts: Any) -> float:
        camera = CameraSnapshot(True, CameraCounters(**counts), {})
        return samples(Exporter(lambda: snapshot(cameras={"top": camera})).text())[
            "edge_dkm_frames_under_way{camera=top}"
        ]

    assert under_way(frames=10, results=9, bad=0, dropped={}) == 1
    assert under_way(frames=10, results=10, bad=1, dropped={}) == -1


def test_each_scrape_takes_one_fresh_snapshot_and_none_before() -> None:
    taken: list[int] = []

    def take() -> Snapshot:
        taken.append(1)
        return snapshot(outbox=OutboxHealth(rows=len(taken), bytes=0, oldest_s=0))

    exporter = Exporter(take)
    assert taken == []
    assert [samples(exporter.text())["edge_dkm_outbox_rows"] for _ in range(3)] == [1, 2, 3]


def test_what_is_not_known_is_left_out() -> None:
    said = samples(Exporter(lambda: snapshot(rss_bytes=None, clock_synced=None)).text())
    assert not {"edge_dkm_rss_bytes", "edge_dkm_clock_synced"} & set(said)


def test_what_has_not_happened_yet_stands_at_zero_so_that_its_first_time_is_an_increase() -> None:
    camera = CameraSnapshot(True, CameraCounters(frames=0, results=0, bad=0, dropped={}), {})
    quiet = snapshot(cameras={"top": camera}, outbox_dropped={}, pubacks={}, restarts={})
    said = samples(Exporter(lambda: quiet).text())
    reasons = ("drop_oldest", "drop_newest", "age", "row_corrupt", "disk_full")
    names = [f"outbox_dropped_total{{camera=top,reason={reason}}}" for reason in reasons]
    names += ["dropped_total{camera=top,reason=superseded}", "puback_total{code=0x97}"]
    names += ["stage_restarts_total{stage=infer}", "stage_restarts_total{stage=process}", "state_corrupt_total"]
    assert {said[f"edge_dkm_{name}"] for name in names} == {0}


def test_only_the_lines_own_figures_are_there() -> None:
    assert all(key.startswith("edge_dkm_") for key in samples(Exporter(snapshot).text()))


def test_two_lines_in_one_process_do_not_meet() -> None:
    one, two = Exporter(snapshot), Exporter(lambda: snapshot(ack_lag=9))
    assert (samples(one.text())["edge_dkm_ack_lag"], samples(two.text())["edge_dkm_ack_lag"]) == (4, 9)


def test_a_missing_package_is_said_with_the_extra_that_brings_it_and_costs_nothing_where_metrics_are_off() -> None:
    program = """
import sys
sys.modules["prometheus_client"] = None
from edge_dkm.errors import UsageError
from edge_dkm.service.metrics import Exporter, Snapshot
try:
    Exporter(lambda: None)
except UsageError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert "pip install 'edge-dkm[metrics]'" in done.stdout, done.stderr


def test_a_value_on_a_bound_counts_as_within_it() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.0, 1.0, 1.000001, 2.0, 99.0, -5.0):
        histogram.observe(value)
    counts = histogram.counts()
    assert (counts.at_most, counts.count, counts.total) == ((3, 5), 6, pytest.approx(98.000001))


def test_what_is_not_finite_is_not_counted() -> None:
    histogram = Histogram((1.0,))
    for value in (float("nan"), float("inf"), float("-inf")):
        histogram.observe(value)
    assert histogram.counts().count == 0


@pytest.mark.parametrize("bounds", [(), (1.0, 1.0), (2.0, 1.0)])
def test_bounds_have_to_rise(bounds: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="expected at least one, rising"):
        Histogram(bounds)


def test_threads_lose_no_observation() -> None:
    histogram = Histogram(INFER_S)
    threads = [threading.Thread(target=lambda: [histogram.observe(0.03) for _ in range(5000)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counts = histogram.counts()
    assert counts.count == counts.at_most[-1] == 20_000 and counts.total == pytest.approx(600)


def test_a_jump_of_the_wall_clock_is_counted_and_its_drift_is_not() -> None:
    jumps = ClockJumps()
    looks = [(1000.0, 0.0), (1005.4, 5.0), (1010.8, 10.0), (4615.8, 15.0), (4620.8, 20.0), (0.0, 25.0)]
    assert [jumps.look(wall_s, mono_s) for wall_s, mono_s in looks] == [False, False, False, True, False, True]
    assert jumps.count == 2


ALERTS = yaml.safe_load((DOCS / "alerts.yml").read_text())
FULL = snapshot(restarts={"cam:top": 1}, state_corrupt=0)


def exported() -> set[str]:
    """Every sample name that a scrape can have."""
    return {key.partition("{")[0] for key in samples(Exporter(lambda: FULL).text())}


def rules() -> list[dict[str, Any]]:
    return [rule for group in ALERTS["groups"] for rule in group["rules"]]


def test_every_metric_of_the_alert_rules_exists() -> None:
    used = {name for rule in rules() for name in re.findall(r"edge_dkm_[a-z_]+", rule["expr"])}
    assert used and used <= exported()


def test_control_a_misspelt_metric_would_be_found() -> None:
    assert "edge_dkm_outbox_row" not in exported()


def test_every_label_of_the_alert_rules_exists() -> None:
    text = Exporter(lambda: FULL).text().decode()
    for rule in rules():
        for name, selector in re.findall(r"(edge_dkm_[a-z_]+)\{([^}]*)\}", rule["expr"]):
            labels = re.findall(r"(\w+)\s*(?:=~|!=|!~|=)", selector)
            assert labels and all(re.search(rf"^{name}{{.*\b{label}=", text, re.MULTILINE) for label in labels), name


def test_the_alert_rules_are_whole() -> None:
    names = [rule["alert"] for rule in rules()]
    assert len(names) == len(set(names)) >= 10
    for rule in rules():
        assert set(rule) >= {"alert", "expr", "labels", "annotations"} and rule["labels"]["severity"] in {
            "page",
            "ticket",
        }
        assert rule["annotations"]["summary"] and re.fullmatch(r"\d+[smh]", rule.get("for", "1m"))
        assert rule["expr"].count("(") == rule["expr"].count(")")


def test_the_novelty_alert_asks_for_a_bucket_that_is_there() -> None:
    expression = next(rule["expr"] for rule in rules() if rule["alert"] == "EdgeDkmNoveltyRate")
    assert set(re.findall(r'le="([^"]+)"', expression)) <= {repr(bound) for bound in NOVELTY}


def test_every_metric_is_described_for_operators_and_nothing_else() -> None:
    text = (DOCS / "operations.md").read_text()
    families = {re.sub(r"_(bucket|count|sum)$", "", name) for name in exported() if "stage_done" not in name}
    families.add("edge_dkm_stage_done_total")
    table = text.split("## Metrics", 1)[1].split("\n## ", 1)[0]
    described = {f"edge_dkm_{name}" for name in re.findall(r"^\| `([a-z_]+)", table, re.MULTILINE)}
    assert described == families


def test_drift_is_one_row_per_cause_and_recommendation() -> None:
    found = samples(Exporter(snapshot).text())
    of = {name: value for name, value in found.items() if "drift" in name or "followed" in name}
    assert [name for name, value in of.items() if value == 1] == [
        "edge_dkm_drift_moved{camera=top,what=light}",
        "edge_dkm_drift_recommended{camera=top,what=camera}",
    ]
    assert sum("drift_moved" in name for name in of) == 5 and sum("drift_recommended" in name for name in of) == 4
    rest = {name.removeprefix("edge_dkm_"): value for name, value in of.items() if value not in (0, 1)}
    top = "{camera=top}"
    assert rest == {f"drift_shift{top}": 0.4, f"drift_novelty_rate{top}": 0.02, "parts_not_followed_total": 3}
