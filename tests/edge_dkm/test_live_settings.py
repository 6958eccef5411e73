from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from edge_dkm.commands.commands import Outcome
from edge_dkm.commands.decoder import VERBS, Command
from edge_dkm.commands.live_settings import KEY, LineFacts, LiveControl, LiveSettings, ModelTable, effective_table
from edge_dkm.contract import Cluster, Verdict
from edge_dkm.decision import Decision, Policy


def cluster(number: int, name: str, verdict: Verdict | None = None) -> Cluster:
    return Cluster(number, name, verdict, 10, 1.0, 0.5, 0.9)


BRACKET = ModelTable("ab12", "bracket.onnx", (cluster(0, "good"), cluster(1, "scratch", "reject"), cluster(2, "dent")))
LID = ModelTable("cd34", "lid.onnx", (cluster(0, "good"),))


@dataclass
class Line:
    """A line's control with its store: restarts with what was remembered."""

    facts: LineFacts
    store: dict[str, str] = field(default_factory=dict)
    applied: list[LiveSettings] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.control = LiveControl(self.facts, self.store.get(KEY), self.applied.append)

    def ask(self, verb: str, **args: Any) -> Outcome:
        outcome = self.control.handlers[verb](Command(verb, "1", VERBS[verb].model_validate(args)))
        self.store |= outcome.remember
        if outcome.then is not None:
            outcome.then()
        return outcome

    def restarted(self, facts: LineFacts | None = None) -> Line:
        return Line(facts or self.facts, self.store)

    def table(self, camera: str = "top") -> list[tuple[str, str | None]]:
        return [(c.name, c.verdict) for c in self.control.table_of(camera)[0]]


@pytest.fixture
def line() -> Iterator[Line]:
    yield Line(LineFacts({"top": BRACKET, "side": BRACKET}, Policy()))


def test_a_pause_survives_a_restart_and_ends_by_resume(line: Line) -> None:
    assert line.ask("pause", reason="tool change").detail == "paused"
    assert line.ask("pause").detail == "paused already"
    assert line.restarted().control.current.paused
    assert line.ask("resume").detail == "resumed" and line.ask("resume").detail == "was not paused"
    assert not line.restarted().control.current.paused
    assert [live.paused for live in line.applied] == [True, True, False, False]


def test_nothing_changes_before_the_answer_is_on_disk(line: Line) -> None:
    outcome = line.control.handlers["pause"](Command("pause", "1", VERBS["pause"]()))
    assert not line.control.current.paused and line.applied == [] and '"paused":true' in outcome.remember[KEY]


def test_a_threshold_holds_for_one_camera_or_for_all(line: Line) -> None:
    assert line.control.threshold_of("top") is None
    line.ask("threshold", value=1.5)
    line.ask("threshold", value=2.0, camera="top")
    assert [line.restarted().control.threshold_of(name) for name in ("top", "side")] == [2.0, 1.5]
    line.ask("threshold", value=1.1)  # the last word
    assert [line.control.threshold_of(name) for name in ("top", "side")] == [1.1, 1.1]


def test_a_threshold_yields_to_a_line_file_that_was_edited_since() -> None:
    line = Line(LineFacts({"top": BRACKET}, Policy(), threshold=1.0))
    line.ask("threshold", value=1.5)
    assert line.restarted().control.threshold_of("top") == 1.5
    edited = LineFacts({"top": BRACKET}, Policy(), threshold=1.2)
    assert line.restarted(edited).control.threshold_of("top") == 1.2


def test_a_label_wins_over_the_model_and_survives(line: Line) -> None:
    assert line.table() == [("good", None), ("scratch", "reject"), ("dent", None)]
    line.ask("label", cluster=2, name="Delle")
    line.ask("label", cluster=2, verdict="reject")  # keeps the name
    line.ask("label", cluster=1, verdict="review")
    expected = [("good", None), ("scratch", "review"), ("Delle", "reject")]
    assert line.table() == expected and line.restarted().table("side") == expected


def test_the_line_file_wins_over_a_label() -> None:
    line = Line(LineFacts({"top": BRACKET}, Policy(clusters={"scratch": "pass", "2": "review"})))
    for number, verdict in ((1, "reject"), (2, "pass")):
        outcome = line.ask("label", cluster=number, verdict=verdict, name="other")
        assert (outcome.ok, outcome.code) == (False, "CMD-LINE-FILE") and outcome.remember == {}
    assert line.ask("label", cluster=1, name="Kratzer").ok and line.ask("label", cluster=2, verdict="review").ok
    assert line.table() == [("good", None), ("Kratzer", "pass"), ("dent", "review")]


def test_a_line_file_that_decides_later_wins_too(line: Line) -> None:
    line.ask("label", cluster=1, verdict="review")
    decided = LineFacts({"top": BRACKET}, Policy(clusters={"scratch": "pass"}))
    assert line.restarted(decided).table()[1] == ("scratch", "pass")


def test_a_label_never_steers_another_cluster() -> None:
    """The keys of the line file mean the model's names and ids, whatever a cluster is called live."""
    policy = Policy(clusters={"2": "reject"})
    line = Line(LineFacts({"top": BRACKET}, policy))
    line.ask("label", cluster=0, name="2")
    clusters, effective = line.control.table_of("top")
    decide = Decision(clusters, effective, "bracket.onnx")
    assert [decide(number, False)[0] for number in range(3)] == ["pass", "reject", "reject"]
    # Control: renamed clusters under the line file's own policy would give cluster 0 the verdict that was meant for 2.
    assert Decision(clusters, policy, "bracket.onnx")(0, False)[0] == "reject"


def test_the_order_of_decision_is_that_of_a_line_without_labels() -> None:
    for policy in (Policy(), Policy("review", "reject", {"good": "pass", "2": "reject"})):
        plain = Decision(BRACKET.clusters, policy, "m")
        effective = Decision(*effective_table(BRACKET, policy, {}), "m")
        for number in range(3):
            for is_novel in (False, True):
                assert effective(number, is_novel) == plain(number, is_novel)


def test_labels_belong_to_a_model_and_not_to_its_successor(line: Line) -> None:
    line.ask("label", cluster=0, name="flat")
    other = LineFacts({"top": LID}, Policy())
    assert line.restarted(other).table() == [("good", None)]
    assert line.restarted().table()[0] == ("flat", None)  # the old model again


def test_with_two_models_a_label_must_say_which(line: Line) -> None:
    mixed = Line(LineFacts({"top": BRACKET, "lid": LID}, Policy()))
    assert mixed.ask("label", cluster=0, name="x").code == "CMD-CAMERA"
    assert mixed.ask("label", cluster=0, name="x", camera="lid").ok
    assert mixed.table("lid") == [("x", None)] and mixed.table("top")[0] == ("good", None)


@pytest.mark.parametrize(
    ("verb", "args", "code"),
    [
        ("threshold", {"value": 1.0, "camera": "back"}, "CMD-CAMERA"),
        ("label", {"cluster": 0, "name": "x", "camera": "back"}, "CMD-CAMERA"),
        ("label", {"cluster": 3, "name": "x"}, "CMD-CLUSTER"),
        ("label", {"cluster": 0, "name": "dent"}, "CMD-NAME-TAKEN"),
    ],
)
def test_what_does_not_fit_the_line_changes_nothing(line: Line, verb: str, args: dict[str, Any], code: str) -> None:
    outcome = line.ask(verb, **args)
    assert (outcome.ok, outcome.code) == (False, code) and line.store == {} and line.applied == []


@pytest.mark.parametrize(
    "text",
    ["", "null", "[]", "{", '{"paused": "maybe"}', '{"thresholds": {"*": {"value": -1}}}', '{"labels": {"a": 1}}'],
)
def test_a_damaged_document_begins_anew_and_says_so(text: str, caplog: pytest.LogCaptureFixture) -> None:
    assert LiveSettings.read(text) == LiveSettings()
    assert "damaged" in caplog.text


def test_the_document_reads_what_it_wrote(line: Line) -> None:
    line.ask("label", cluster=1, name="Kratzer öben", verdict="reject")
    line.ask("threshold", value=1.25, camera="top")
    line.ask("pause", reason="shift change")
    assert LiveSettings.read(line.store[KEY]) == line.control.current
