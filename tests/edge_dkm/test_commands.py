from __future__ import annotations

import json
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_dkm.commands import decoder as command_decoder
from edge_dkm.commands.commands import MAX_WAITING, REFUSALS_BURST, Commands, Handler, Outcome
from edge_dkm.commands.decoder import (
    VERBS,
    Command,
    LabelArgs,
    PartArgs,
    Refusal,
    ReplayArgs,
    ThresholdArgs,
    TriggerArgs,
    decode,
)
from edge_dkm.errors import StorageError
from edge_dkm.outbox import Outbox
from tests.waiting import wait_until

BASE = "acme/plant1/dkm/v1/st1"
LONG = os.environ.get("EDGE_DKM_LONG") == "1"
INPUTS, DRAWN = (1_000_000, 20_000) if LONG else (5_000, 200)


def decoded(verb: str, body: object, retained: bool = False) -> Command | Refusal:
    payload = body if isinstance(body, bytes) else json.dumps(body).encode()
    return decode(BASE, f"{BASE}/{verb}", payload, retained)


def code(verb: str, body: object, retained: bool = False) -> str:
    found = decoded(verb, body, retained)
    assert isinstance(found, Refusal), found
    assert len(found.detail) < 300 and found.detail.isprintable()
    return found.code


REPLAY = {"camera": "top", "epoch": "9f1c", "from": 3, "to": 9}


@pytest.mark.parametrize(
    ("topic", "args", "expected"),
    [
        ("top/cmd/trigger", {}, TriggerArgs()),
        (
            "top/cmd/trigger",
            {"part": {"id": "SN/../1", "product": "A17"}},
            TriggerArgs(part=PartArgs(id="SN/../1", product="A17")),
        ),
        ("cmd/threshold", {"value": 2}, ThresholdArgs(value=2.0)),
        ("cmd/threshold", {"value": 1.25, "camera": "top"}, ThresholdArgs(value=1.25, camera="top")),
        ("cmd/label", {"cluster": 3, "name": "Kratzer öben"}, LabelArgs(cluster=3, name="Kratzer öben")),
        ("cmd/label", {"cluster": 0, "verdict": "reject"}, LabelArgs(cluster=0, verdict="reject")),
    ],
)
def test_a_command_is_its_topic_id_and_arguments(topic: str, args: dict[str, Any], expected: object) -> None:
    found = decoded(topic, {"schema": "dkm.cmd/1", "id": "job-17:4_a.b", "args": args})
    camera = "top" if topic.startswith("top") else None
    assert found == Command(topic.rsplit("/", 1)[-1], "job-17:4_a.b", expected, camera)  # type: ignore[arg-type]


def test_a_replay_names_its_range() -> None:
    found = decoded("cmd/replay", {"id": "1", "args": REPLAY})
    assert isinstance(found, Command)
    args = found.arguments(ReplayArgs)
    assert (args.camera, args.epoch, args.from_, args.to) == ("top", "9f1c", 3, 9)


@pytest.mark.parametrize(
    ("verb", "body", "expected"),
    [
        ("cmd/pause", b'{"id":"1","x":"' + b"a" * 16_384, "CMD-SIZE"),
        ("cmd/pause", b'{"id":"\xff"}', "CMD-UTF8"),
        ("cmd/pause", b"[" * 16_000, "CMD-DEPTH"),
        ("cmd/pause", b'{"id":"1","args":{"reason":' + b"[" * 7 + b"]" * 7 + b"}}", "CMD-DEPTH"),
        ("cmd/pause", b"", "CMD-JSON"),
        ("cmd/pause", b"\xef\xbb\xbf{}", "CMD-JSON"),
        ("cmd/pause", b'{"id":"1"} {}', "CMD-JSON"),
        ("cmd/pause", b'{"id":"1"', "CMD-JSON"),
        ("cmd/pause", b'["id"]', "CMD-OBJECT"),
        ("cmd/pause", b"null", "CMD-OBJECT"),
        ("cmd/pause", b'{"id":"1","id":"2"}', "CMD-DUPLICATE-KEY"),
        ("cmd/replay", b'{"id":"1","args":{"camera":"a","camera":"b"}}', "CMD-DUPLICATE-KEY"),
        ("cmd/threshold", b'{"id":"1","args":{"value":NaN}}', "CMD-NUMBER"),
        ("cmd/threshold", b'{"id":"1","args":{"value":-Infinity}}', "CMD-NUMBER"),
        ("cmd/threshold", b'{"id":"1","args":{"value":1e999}}', "CMD-NUMBER"),
        ("cmd/label", b'{"id":"1","args":{"cluster":' + b"9" * 5000 + b"}}", "CMD-NUMBER"),
        ("cmd/pause", {}, "CMD-ID"),
        ("cmd/pause", {"id": ""}, "CMD-ID"),
        ("cmd/pause", {"id": 7}, "CMD-ID"),
        ("cmd/pause", {"id": "a" * 65}, "CMD-ID"),
        ("cmd/pause", {"id": "a b"}, "CMD-ID"),
        ("cmd/pause", {"id": "a\n"}, "CMD-ID"),
        ("cmd/pause", {"id": "é"}, "CMD-ID"),
        ("cmd/stop", {"id": "1"}, "CMD-VERB"),
        ("cmd/", {"id": "1"}, "CMD-VERB"),
        ("top/cmd/pause", {"id": "1"}, "CMD-VERB"),
        ("top/side/cmd/trigger", {"id": "1"}, "CMD-TOPIC"),
        ("t p/cmd/trigger", {"id": "1"}, "CMD-TOPIC"),
        ("cmd/recipe", {"id": "1"}, "not_built"),
        ("cmd/feedback", {"id": "1"}, "not_built"),
        ("cmd/model", {"id": "1"}, "not_built"),
        ("top/cmd/trigger", {"id": "1", "args": {"recipe": "A17"}}, "not_built"),
        ("cmd/pause", {"id": "1", "schema": "dkm.cmd/2"}, "CMD-SCHEMA"),
        ("cmd/pause", {"id": "1", "not_befor": "x"}, "CMD-KEY"),
        ("cmd/pause", {"id": "1", "station": "st2"}, "CMD-STATION"),
        ("cmd/pause", {"id": "1", "station": ["st1"]}, "CMD-STATION"),
        ("cmd/pause", {"id": "1", "not_after": "2001-02-03T04:05:06Z"}, "CMD-EXPIRED"),
        ("cmd/pause", {"id": "1", "ts": "2901-02-03T04:05:06Z"}, "CMD-FUTURE"),
        ("cmd/pause", {"id": "1", "ts": "2901-02-03T04:05:06"}, "CMD-TIME"),
        ("cmd/pause", {"id": "1", "not_after": 1e18}, "CMD-TIME"),
        ("cmd/pause", {"id": "1", "not_after": "9999-12-31T23:59:59-23:00"}, "CMD-TIME"),
        ("cmd/pause", {"id": "1", "args": []}, "CMD-ARGS"),
        ("cmd/pause", {"id": "1", "args": None}, "CMD-ARGS"),
        ("cmd/pause", {"id": "1", "args": {"force": True}}, "CMD-ARG-UNKNOWN"),
        ("cmd/pause", {"id": "1", "args": {"\u202e\n" * 30: True}}, "CMD-ARG-UNKNOWN"),
        ("cmd/pause", {"id": "1", "args": {"\ud83d": True}}, "CMD-ARG-VALUE"),
        ("cmd/resume", {"id": "1", "args": {"reason": "x"}}, "CMD-ARG-UNKNOWN"),
        ("cmd/pause", {"id": "1", "args": {"reason": "a\x1b[2J"}}, "CMD-ARG-VALUE"),
        ("cmd/pause", {"id": "1", "args": {"reason": "a" * 129}}, "CMD-ARG-VALUE"),
        ("top/cmd/trigger", {"id": "1", "args": {"part": {}}}, "CMD-ARG-MISSING"),
        ("top/cmd/trigger", {"id": "1", "args": {"part": {"id": ""}}}, "CMD-ARG-VALUE"),
        ("top/cmd/trigger", {"id": "1", "args": {"part": {"id": "\u202e"}}}, "CMD-ARG-VALUE"),
        ("top/cmd/trigger", {"id": "1", "args": {"part": "SN1"}}, "CMD-ARG-VALUE"),
        ("cmd/replay", {"id": "1", "args": {**REPLAY, "camera": "../top"}}, "CMD-ARG-VALUE"),
        ("cmd/replay", {"id": "1", "args": {**REPLAY, "from": 0}}, "CMD-ARG-VALUE"),
        ("cmd/replay", {"id": "1", "args": {**REPLAY, "from": 10}}, "CMD-ARG-VALUE"),
        ("cmd/replay", {"id": "1", "args": {**REPLAY, "to": True}}, "CMD-ARG-VALUE"),
        ("cmd/replay", {"id": "1", "args": {**REPLAY, "to": 9.0}}, "CMD-ARG-VALUE"),
        ("cmd/replay", {"id": "1", "args": {**REPLAY, "epoch": "a/b"}}, "CMD-ARG-VALUE"),
        ("cmd/replay", {"id": "1", "args": {"camera": "top"}}, "CMD-ARG-MISSING"),
        ("cmd/threshold", {"id": "1", "args": {"value": 0}}, "CMD-ARG-VALUE"),
        ("cmd/threshold", {"id": "1", "args": {"value": -1.0}}, "CMD-ARG-VALUE"),
        ("cmd/threshold", {"id": "1", "args": {"value": 1e39}}, "CMD-ARG-VALUE"),  # infinite in float32
        ("cmd/threshold", {"id": "1", "args": {"value": 1e-50}}, "CMD-ARG-VALUE"),  # zero in float32
        ("cmd/threshold", {"id": "1", "args": {"value": "1.0"}}, "CMD-ARG-VALUE"),
        ("cmd/threshold", {"id": "1", "args": {"value": True}}, "CMD-ARG-VALUE"),
        ("cmd/label", {"id": "1", "args": {"cluster": 1}}, "CMD-ARG-VALUE"),
        ("cmd/label", {"id": "1", "args": {"cluster": -1, "name": "a"}}, "CMD-ARG-VALUE"),
        ("cmd/label", {"id": "1", "args": {"cluster": 1.5, "name": "a"}}, "CMD-ARG-VALUE"),
        ("cmd/label", {"id": "1", "args": {"cluster": 1, "name": "a" * 65}}, "CMD-ARG-VALUE"),
        ("cmd/label", {"id": "1", "args": {"cluster": 1, "name": "\ud800"}}, "CMD-ARG-VALUE"),
        ("cmd/label", {"id": "1", "args": {"cluster": 1, "verdict": "scrap"}}, "CMD-ARG-VALUE"),
    ],
)
def test_what_is_no_command_has_a_code_of_its_own(verb: str, body: object, expected: str) -> None:
    assert code(verb, body) == expected


def test_a_retained_command_is_refused_and_says_its_id() -> None:
    found = decoded("cmd/pause", {"id": "old"}, retained=True)
    assert isinstance(found, Refusal) and (found.code, found.id) == ("CMD-RETAINED", "old")


def test_a_topic_of_another_station_is_no_command() -> None:
    for topic in ("acme/plant1/dkm/v1/st11/cmd/pause", "dkm/v1/st1/cmd/pause", "", f"{BASE}/cmd"):
        found = decode(BASE, topic, b'{"id":"1"}', False)
        assert isinstance(found, Refusal) and found.code == "CMD-TOPIC"


def test_eight_levels_are_deep_enough_and_brackets_in_text_do_not_count() -> None:
    eight = b'{"id":"1","args":{"reason":' + b"[" * 6 + b"]" * 6 + b"}}"
    assert code("cmd/pause", eight) == "CMD-ARG-VALUE"
    text = json.dumps({"id": "1", "args": {"reason": '[[[[[[[[[[\\"[[['}}).encode()
    assert isinstance(decoded("cmd/pause", text), Command)


KEYS = st.sampled_from(
    ["id", "args", "schema", "station", "not_after", "ts", "part", "camera", "value", "from", "to", "cluster", "name"]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12) | st.sampled_from(["1", "top"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.text(max_size=3), inner, max_size=5),
    max_leaves=12,
)
TOPICS = st.sampled_from([f"{BASE}/cmd/{verb}" for verb in [*VERBS, "model", "x"]] + [f"{BASE}/top/cmd/trigger"])


@settings(max_examples=DRAWN, deadline=None, database=None)
@given(
    TOPICS | st.text(max_size=40), st.binary(max_size=60) | JSON.map(lambda v: json.dumps(v).encode()), st.booleans()
)
def test_any_message_is_a_command_or_a_refusal(topic: str, payload: bytes, retained: bool) -> None:
    found = decode(BASE, topic, payload, retained)
    assert isinstance(found, Command) or (found.detail.isprintable() and len(found.detail) < 300)


def test_mutated_commands_are_commands_or_refusals() -> None:
    """Plain random mutation is a hundred times faster than drawing: most of the million inputs."""
    rng = random.Random(5)
    bodies: list[dict[str, Any]] = [
        {"id": "1", "args": REPLAY, "not_after": "2901-01-01T00:00:00Z", "ts": "2001-01-01T00:00:00Z"},
        {"id": "1", "args": {"part": {"id": "SN", "product": "P"}}, "station": "st1", "schema": "dkm.cmd/1"},
        {"id": "1", "args": {"cluster": 1, "name": "é\u2028", "verdict": "pass"}},
    ]
    seeds = [json.dumps(body, ensure_ascii=n % 2 == 0).encode() for body in bodies for n in range(2)]
    pieces = [b"{", b"[", b'"', b"\\", b"\\ud800", b"NaN", b"1e9999", b"9" * 30, b"\xff", b"\x00", b",", b"null", b"-"]
    verbs = [f"cmd/{verb}" for verb in VERBS] + ["top/cmd/trigger"]
    commands = 0
    for _ in range(INPUTS):
        payload = bytearray(rng.choice(seeds))
        for _ in range(rng.randrange(4)):
            at = rng.randrange(len(payload))
            payload[at : at + rng.randrange(3)] = rng.choice(pieces)
        found = decode(BASE, f"{BASE}/{rng.choice(verbs)}", bytes(payload), rng.random() < 0.05)
        commands += isinstance(found, Command)
        assert isinstance(found, Command) or (found.detail.isprintable() and len(found.detail) < 300)
    assert INPUTS // 50 < commands < INPUTS // 2  # the mutants are worth their time: neither all good nor all bad


def test_control_without_the_depth_check_the_parser_itself_would_recurse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command_decoder, "_depth", lambda text: 0)
    with pytest.raises(RecursionError):
        decoded("cmd/pause", b"[" * 16_000)


class Memory:
    """A store without a disk; `fails` makes it a full one."""

    def __init__(self) -> None:
        self.replies: dict[str, bytes] = {}
        self.remembered: dict[str, str] = {}
        self.fails = False

    def find_reply(self, command_id: str) -> bytes | None:
        return self.replies.get(command_id)

    def record_reply(self, command_id: str, reply: bytes, remember: Mapping[str, str]) -> None:
        if self.fails:
            raise StorageError("outbox st.db cannot be written: disk full")
        self.replies[command_id] = reply
        self.remembered |= remember


class Station:
    """The command channel without a broker: what would be published is collected."""

    def __init__(self, handlers: Mapping[str, Handler], store: Any) -> None:
        self.said: list[dict[str, Any]] = []
        self.commands = Commands(BASE, handlers, store, self._say)
        self.commands.start()

    def _say(self, topic: str, build: Callable[[int], bytes], qos: int) -> None:
        assert (topic, qos) == (f"{BASE}/reply", 1)
        self.said.append(json.loads(build(7)))

    def ask(self, verb: str, command_id: str, retained: bool = False, **more: Any) -> None:
        self.commands.submit(f"{BASE}/{verb}", json.dumps({"id": command_id, **more}).encode(), retained)

    def answers(self, count: int) -> list[tuple[Any, ...]]:
        """(id, ok, code) of the first replies, once there are so many."""
        wait_until(lambda: len(self.said) >= count)
        return [(reply.get("id"), reply["ok"], reply.get("code")) for reply in self.said]


@pytest.fixture
def start() -> Iterator[Callable[..., Station]]:
    """Starts command channels; closed at the end."""
    stations: list[Station] = []

    def make(handlers: Mapping[str, Handler] | None = None, store: Any = None) -> Station:
        stations.append(Station(handlers or {}, store or Memory()))
        return stations[-1]

    yield make
    for station in stations:
        station.commands.close()
        assert not station.commands.is_alive()


def noting(done: list[str]) -> Handler:
    def handler(command: Command) -> Outcome:
        done.append(command.id)
        return Outcome(True, detail=f"did {command.id}")

    return handler


def test_commands_are_done_in_order_and_answered(start: Callable[..., Station]) -> None:
    done: list[str] = []
    station = start({"pause": noting(done), "resume": noting(done)})
    for n in range(20):
        station.ask("cmd/pause" if n % 2 else "cmd/resume", str(n))
    assert station.answers(20) == [(str(n), True, None) for n in range(20)]
    assert done == [str(n) for n in range(20)]
    reply = station.said[0]
    assert reply["schema"] == "dkm.reply/1" and reply["station"] == "st1" and reply["session"] == 7 and reply["ts"]


def test_an_empty_message_which_clears_a_topic_is_not_answered(start: Callable[..., Station]) -> None:
    station = start()
    station.commands.submit(f"{BASE}/cmd/pause", b"", False)
    station.commands.submit(f"{BASE}/cmd/pause", b" ", False)  # control: this is a message
    station.answers(1)
    assert [reply["code"] for reply in station.said] == ["CMD-JSON"] and station.commands.counts.unanswered == 1


def test_the_same_id_is_answered_again_and_not_done_again(start: Callable[..., Station]) -> None:
    done: list[str] = []
    store = Memory()
    station = start({"pause": noting(done)}, store)
    for _ in range(3):
        station.ask("cmd/pause", "a")
    station.ask("cmd/pause", "a", retained=True)
    station.ask("cmd/pause", "a", not_after="2001-01-01T00:00:00Z")
    station.answers(5)
    again = start({"pause": noting(done)}, store)  # after a restart
    again.ask("cmd/pause", "a")
    again.answers(1)
    replies = [{key: value for key, value in r.items() if key != "ts"} for r in station.said + again.said]
    assert done == ["a"] and replies == [replies[0]] * 6 and replies[0]["detail"] == "did a"


def test_an_id_used_for_another_command_is_told_so(start: Callable[..., Station]) -> None:
    done: list[str] = []
    station = start({"pause": noting(done), "resume": noting(done)})
    station.ask("cmd/pause", "a")
    station.ask("cmd/resume", "a")
    station.ask("cmd/pause", "a", args={"reason": "other"})
    assert station.answers(3)[1:] == [("a", False, "CMD-ID-REUSED")] * 2 and done == ["a"]


def test_a_stale_command_that_was_never_done_is_refused_and_may_come_again_fresh(
    start: Callable[..., Station],
) -> None:
    done: list[str] = []
    station = start({"pause": noting(done)})
    station.ask("cmd/pause", "a", retained=True)
    station.ask("cmd/pause", "a")
    assert station.answers(2) == [("a", False, "CMD-RETAINED"), ("a", True, None)] and done == ["a"]


def test_a_handler_that_fails_is_answered_and_the_next_command_is_heard(start: Callable[..., Station]) -> None:
    def fail(command: Command) -> Outcome:
        raise RuntimeError("no such thing")

    done: list[str] = []
    station = start({"pause": fail, "resume": noting(done)})
    station.ask("cmd/pause", "a")
    station.ask("cmd/resume", "b")
    assert station.answers(2) == [("a", False, "CMD-FAILED"), ("b", True, None)]
    assert station.said[0]["detail"] == "RuntimeError: no such thing"


def test_a_verb_without_a_handler_is_not_built(start: Callable[..., Station]) -> None:
    station = start()
    station.ask("cmd/resume", "a")
    assert station.answers(1) == [("a", False, "not_built")]


def test_what_must_survive_is_stored_with_the_answer_and_takes_effect_after_it(
    start: Callable[..., Station],
) -> None:
    store, effects = Memory(), []
    outcome = Outcome(True, None, "ok", {"live": "1"}, lambda: effects.append(dict(store.remembered)))
    station = start({"pause": lambda command: outcome}, store)
    station.ask("cmd/pause", "a")
    assert station.answers(1) == [("a", True, None)] and effects == [{"live": "1"}]


def test_a_full_disk_changes_nothing_and_the_same_id_works_later(start: Callable[..., Station]) -> None:
    store, effects = Memory(), []
    outcome = Outcome(True, None, "ok", {"live": "1"}, lambda: effects.append(1))
    station = start({"pause": lambda command: outcome}, store)
    store.fails = True
    station.ask("cmd/pause", "a")
    assert station.answers(1) == [("a", False, "CMD-STORE")] and effects == []
    store.fails = False
    station.ask("cmd/pause", "a")
    assert station.answers(2)[1] == ("a", True, None) and effects == [1]


def test_a_trigger_that_was_cut_off_is_not_fired_a_second_time(start: Callable[..., Station]) -> None:
    store, fired = Memory(), []
    cut_off: dict[str, bytes] = {}

    def fire(command: Command) -> Outcome:
        fired.append(command.id)
        cut_off.update(store.replies)  # what the disk holds if the process dies here
        return Outcome(True)

    station = start({"trigger": fire}, store)
    station.ask("top/cmd/trigger", "a")
    assert station.answers(1) == [("a", True, None)]
    store.replies = cut_off
    again = start({"trigger": fire}, store)
    again.ask("top/cmd/trigger", "a")
    assert again.answers(1) == [("a", False, "CMD-CUT-OFF")] and fired == ["a"]


def test_a_slow_command_never_blocks_the_sender_and_too_many_are_told(start: Callable[..., Station]) -> None:
    go, entered = threading.Event(), threading.Event()

    def wait(command: Command) -> Outcome:
        entered.set()
        go.wait(20)
        return Outcome(True)

    station = start({"pause": wait})
    station.ask("cmd/pause", "first")
    assert entered.wait(20)
    for n in range(MAX_WAITING + 3):
        station.ask("cmd/pause", str(n))
    busy = station.answers(3)
    assert busy == [(str(n), False, "CMD-BUSY") for n in range(MAX_WAITING, MAX_WAITING + 3)]
    assert station.commands.counts.waiting == MAX_WAITING and station.commands.stage.health().state != "idle"
    go.set()
    station.answers(3 + 1 + MAX_WAITING)
    station.ask("cmd/pause", str(MAX_WAITING))  # nothing was kept of the refused one
    assert station.answers(5 + MAX_WAITING)[-1] == (str(MAX_WAITING), True, None)


def test_a_flood_of_garbage_is_counted_and_answered_at_a_bounded_rate(start: Callable[..., Station]) -> None:
    done: list[str] = []
    started_s = time.monotonic()
    station = start({"pause": noting(done)})
    for n in range(3000):
        station.commands.submit(f"{BASE}/cmd/pause", b"{" * (n % 20_000), False)
    wait_until(lambda: station.commands.counts.waiting == 0)
    station.ask("cmd/pause", "a")
    wait_until(lambda: done == ["a"])
    allowed = REFUSALS_BURST + (time.monotonic() - started_s) + 2
    wait_until(lambda: station.said[-1].get("id") == "a")
    counts = station.commands.counts
    assert len(station.said) <= allowed + 1 and counts.refused == 3000
    assert counts.unanswered == 3000 - (len(station.said) - 1) and counts.done == 1


def test_answers_survive_in_the_outbox(start: Callable[..., Station], tmp_path: Any) -> None:
    done: list[str] = []
    for _ in range(2):
        outbox = Outbox(tmp_path / "outbox.db", "st1", lambda camera: f"{BASE}/{camera}/result")
        station = start({"pause": noting(done), "trigger": noting(done)}, outbox)
        station.ask("cmd/pause", "a")
        station.ask("top/cmd/trigger", "b")
        assert station.answers(2) == [("a", True, None), ("b", True, None)]
        station.commands.close()
        outbox.close()
    assert done == ["a", "b"]
