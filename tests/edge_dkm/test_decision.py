from __future__ import annotations

import pytest

from edge_dkm.contract import Cluster, Verdict
from edge_dkm.decision import Decision, Policy


def cluster(verdict: Verdict | None, number: int = 0, name: str = "a") -> Cluster:
    return Cluster(number, name, verdict, 1, 1.0, 0.5, 0.9)


@pytest.mark.parametrize(
    ("verdict", "is_novel", "expected"),
    [
        ("reject", True, ("reject", "cluster_verdict")),  # a known defect stays rejected however strange it looks
        ("reject", False, ("reject", "cluster_verdict")),
        ("pass", True, ("review", "novel")),
        ("pass", False, ("pass", "cluster_verdict")),
        ("review", False, ("review", "cluster_verdict")),
        (None, True, ("review", "novel")),
        (None, False, ("pass", "default")),
    ],
)
def test_the_order_is_reject_then_novel_then_the_clusters_own_verdict(
    verdict: Verdict | None, is_novel: bool, expected: tuple[str, str]
) -> None:
    assert Decision((cluster(verdict),), Policy(), "m")(0, is_novel) == expected


def test_the_line_overrules_the_graph_by_name_or_by_id() -> None:
    clusters = (cluster("pass", 0, "good"), cluster("pass", 1, "scratch"))
    decide = Decision(clusters, Policy(clusters={"scratch": "reject", "0": "review"}), "m")
    assert decide(1, False) == ("reject", "cluster_verdict") and decide(0, False) == ("review", "cluster_verdict")


def test_default_and_novel_verdicts_are_the_policys() -> None:
    decide = Decision((cluster(None),), Policy(default="review", novel="reject"), "m")
    assert decide(0, False) == ("review", "default") and decide(0, True) == ("reject", "novel")
