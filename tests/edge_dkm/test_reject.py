"""The reject output against pymodbus' own server: OK only when it is due, NG otherwise, and nobody ever waits for the PLC."""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Protocol

import pytest

from devices.outputs import Output, OutputSettings
from devices.outputs.modbus import ModbusOutput, ModbusSettings
from edge_dkm.contract import Verdict
from edge_dkm.reject import RejectOutput
from tests.plc import Plc
from tests.waiting import wait_until

COIL, HEARTBEAT = 3, 9
FAR_S = 1000.0


class Gate(Protocol):
    def start(self) -> None: ...
    def arm(self, case_id: str, deadline_s: float | None) -> None: ...
    def decide(self, case_id: str, verdict: Verdict) -> None: ...
    def fail(self, reason: str) -> None: ...
    def close(self) -> bool: ...


class NaiveGate:
    """The control: writes what it is told when it is told, and nothing else."""

    def __init__(self, output: Output) -> None:
        self._output = output

    def start(self) -> None: ...
    def arm(self, case_id: str, deadline_s: float | None) -> None: ...
    def fail(self, reason: str) -> None: ...

    def decide(self, case_id: str, verdict: Verdict) -> None:
        if verdict == "pass":
            self._output.set_ok()
        else:
            self._output.set_ng()

    def close(self) -> bool:
        self._output._drop()
        return True


class NaiveOutput(ModbusOutput):
    """Not even NG first."""

    def _open_and_write(self, is_ok: bool) -> None:
        if not self.is_open:
            self._open()
            self.is_open = True
        self._write(is_ok)


@pytest.fixture
def plc() -> Iterator[Plc]:
    machine = Plc()
    yield machine
    machine.close()


@pytest.fixture
def gate_to() -> Iterator[Callable[..., RejectOutput]]:
    """Started reject outputs to a PLC; all are closed at the end."""
    running: list[RejectOutput] = []

    def start(plc: Plc, **options: object) -> RejectOutput:
        gate = RejectOutput("top", ModbusOutput(settings_for(plc, **options)))
        running.append(gate)
        gate.start()
        return gate

    yield start
    for gate in running:
        assert gate.close(20)


def settings_for(plc: Plc, **options: object) -> ModbusSettings:
    values = {"host": "127.0.0.1", "port": plc.port, "coil": COIL, "timeout_s": 2.0, "heartbeat_s": 0.05, **options}
    return ModbusSettings.model_validate(values)


def soon(seconds: float = FAR_S) -> float:
    return time.monotonic() + seconds


def pass_part(gate: RejectOutput, name: str = "good") -> None:
    """One part that is judged OK in time, with the coil to show for it."""
    before = gate.status().ok
    gate.arm(name, soon())
    gate.decide(name, "pass")
    wait_until(lambda: gate.status().ok == before + 1)
    assert gate.status().signal == "ok"


def books_balance(gate: RejectOutput, open_parts: int = 0) -> bool:
    now = gate.status()
    return now.armed == now.ok + now.ng + now.late + now.stale + now.lost + open_parts


# Each scenario holds for the real thing, given time, and must fail for the naive one.


def nothing_is_ok_at_boot(gate: Gate, plc: Plc, patience_s: float) -> None:
    gate.start()
    wait_until(lambda: not plc.coil(COIL), patience_s)


def silence_is_ng(gate: Gate, plc: Plc, patience_s: float) -> None:
    gate.start()
    gate.arm("1", soon())
    gate.decide("1", "pass")
    wait_until(lambda: plc.coil(COIL))
    gate.arm("2", soon(0.05))
    wait_until(lambda: not plc.coil(COIL), patience_s)


def a_late_ok_stays_ng(gate: Gate, plc: Plc, patience_s: float) -> None:
    gate.start()
    gate.arm("1", soon(-0.001))
    gate.decide("1", "pass")
    gate.close()
    assert True not in plc.values(COIL)


def an_overtaken_ok_is_not_written(gate: Gate, plc: Plc, patience_s: float) -> None:
    gate.start()
    gate.arm("1", soon())
    gate.arm("2", soon())
    gate.decide("1", "pass")
    gate.close()
    assert True not in plc.values(COIL)


def an_error_takes_the_ok_back(gate: Gate, plc: Plc, patience_s: float) -> None:
    gate.start()
    gate.arm("1", soon())
    gate.decide("1", "pass")
    wait_until(lambda: plc.coil(COIL))
    gate.fail("C-LOST the camera is gone")
    wait_until(lambda: not plc.coil(COIL), patience_s)


def the_end_leaves_ng(gate: Gate, plc: Plc, patience_s: float) -> None:
    gate.start()
    gate.arm("1", soon())
    gate.decide("1", "pass")
    wait_until(lambda: plc.coil(COIL))
    gate.close()
    assert not plc.coil(COIL)


Scenario = Callable[[Gate, Plc, float], None]
SCENARIOS: list[Scenario] = [
    nothing_is_ok_at_boot,
    silence_is_ng,
    a_late_ok_stays_ng,
    an_overtaken_ok_is_not_written,
    an_error_takes_the_ok_back,
    the_end_leaves_ng,
]


@pytest.fixture
def used_plc(request: pytest.FixtureRequest) -> Iterator[Plc]:
    """A PLC; for the boot, one whose coil an earlier run left at OK."""
    machine = Plc(initial=request.node.callspec.params["scenario"] is nothing_is_ok_at_boot)
    yield machine
    machine.close()


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.__name__)
def test_ng_is_the_answer_to_everything_but_an_ok_in_time(scenario: Scenario, used_plc: Plc) -> None:
    gate = RejectOutput("top", ModbusOutput(settings_for(used_plc)))
    try:
        scenario(gate, used_plc, 20)
        wait_until(lambda: books_balance(gate))
    finally:
        assert gate.close(20)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.__name__)
def test_control_an_output_that_writes_decisions_and_no_more_fails_each(scenario: Scenario, used_plc: Plc) -> None:
    gate = NaiveGate(NaiveOutput(settings_for(used_plc)))
    try:
        with pytest.raises(AssertionError):
            scenario(gate, used_plc, 0.3)
    finally:
        gate.close()


@pytest.mark.parametrize(
    ("verdict", "ok", "is_ok"),
    [
        ("pass", ["pass"], True),
        ("review", ["pass"], False),
        ("review", ["pass", "review"], True),
        ("reject", ["pass", "review"], False),
        ("error", ["pass", "review"], False),
    ],
)
def test_only_the_listed_verdicts_are_ok(
    plc: Plc, gate_to: Callable[..., RejectOutput], verdict: Verdict, ok: list[str], is_ok: bool
) -> None:
    gate = gate_to(plc, ok=ok)
    gate.arm("1", soon())
    gate.decide("1", verdict)
    wait_until(lambda: books_balance(gate) and gate.status().armed == 1)
    wait_until(lambda: plc.coil(COIL) is is_ok)
    now = gate.status()
    assert (now.ok, now.ng, now.signal, now.state) == (int(is_ok), int(not is_ok), "ok" if is_ok else "ng", "ok")


def test_ng_stands_between_any_two_parts(plc: Plc, gate_to: Callable[..., RejectOutput]) -> None:
    gate = gate_to(plc)
    for n in range(5):
        pass_part(gate, str(n))
    assert gate.close(20)
    written = plc.values(COIL)
    assert written.count(True) == 5
    assert all(written[n - 1] is False for n, value in enumerate(written) if value)
    assert gate.status().state == "stopped"


def test_the_first_verdict_counts_and_strangers_do_not(plc: Plc, gate_to: Callable[..., RejectOutput]) -> None:
    gate = gate_to(plc)
    gate.decide("never armed", "pass")
    gate.arm("1", soon())
    gate.decide("someone else", "pass")
    gate.decide("1", "reject")
    gate.decide("1", "pass")
    wait_until(lambda: gate.status().ng == 1)
    assert gate.close(20)
    assert True not in plc.values(COIL)


def test_an_ok_falls_back_to_ng_after_hold_ms(plc: Plc, gate_to: Callable[..., RejectOutput]) -> None:
    gate = gate_to(plc, hold_ms=50)
    gate.arm("1", soon())
    gate.decide("1", "pass")
    wait_until(lambda: gate.status().ok == 1 and gate.status().signal == "ng")
    assert not plc.coil(COIL)
    assert plc.values(COIL)[-2:] == [True, False]


def test_no_verdict_by_the_deadline_is_ng_and_a_later_ok_changes_nothing(
    plc: Plc, gate_to: Callable[..., RejectOutput]
) -> None:
    gate = gate_to(plc)
    gate.arm("1", soon(0.05))
    wait_until(lambda: gate.status().late == 1)
    gate.decide("1", "pass")
    assert gate.close(20)
    assert True not in plc.values(COIL) and gate.status().late == 1 and books_balance(gate)


def test_without_a_deadline_an_ok_is_never_late(plc: Plc, gate_to: Callable[..., RejectOutput]) -> None:
    gate = gate_to(plc)
    arm_quietly(gate, "1", None)
    gate.decide("1", "pass")
    wait_until(lambda: plc.coil(COIL))
    assert gate.status().late == 0


def arm_quietly(gate: RejectOutput, name: str, deadline_s: float | None) -> None:
    """Arms a fresh gate's first part; when this returns its NG is acknowledged and nothing is under way."""
    wait_until(lambda: gate.stage.count == 1)
    gate.arm(name, deadline_s)
    wait_until(lambda: gate.stage.count == 2)


def test_an_ok_that_is_acknowledged_after_the_deadline_is_taken_back(
    plc: Plc, gate_to: Callable[..., RejectOutput]
) -> None:
    gate = gate_to(plc, timeout_s=10)
    deadline_s = soon(0.7)
    arm_quietly(gate, "1", deadline_s)
    plc.hold()
    gate.decide("1", "pass")
    wait_until(lambda: (COIL, True) in plc.held)
    wait_until(lambda: time.monotonic() > deadline_s)
    plc.release()
    wait_until(lambda: gate.status().late == 1 and gate.status().signal == "ng")
    assert plc.values(COIL)[-1] is False
    assert gate.status().ok == 0


def test_an_ok_under_way_when_the_next_part_comes_is_taken_back(plc: Plc, gate_to: Callable[..., RejectOutput]) -> None:
    gate = gate_to(plc, timeout_s=10)
    arm_quietly(gate, "1", soon())
    plc.hold()
    gate.decide("1", "pass")
    wait_until(lambda: (COIL, True) in plc.held)
    gate.arm("2", soon())
    plc.release()
    wait_until(lambda: gate.status().signal == "ng")
    assert plc.values(COIL)[-1] is False
    assert gate.status().stale == 1 and gate.status().ok == 0 and books_balance(gate, open_parts=1)


def test_a_dead_plc_is_told_and_comes_back_to_ng(plc: Plc, gate_to: Callable[..., RejectOutput]) -> None:
    gate = gate_to(plc)
    pass_part(gate)
    plc.stop()
    gate.arm("1", soon())
    wait_until(lambda: gate.status().state == "degraded")
    gate.decide("1", "pass")
    now = gate.status()
    assert (now.lost, now.code, now.signal) == (1, "O-LOST", "unknown") and "cannot be reached" in (now.problem or "")
    assert gate.stage.health().state == "degraded"
    plc.written.clear()
    plc.initial = True  # a PLC that remembers: OK is what it shows when it is back
    plc.start()
    wait_until(lambda: gate.status().state == "ok")
    assert not plc.coil(COIL) and plc.values(COIL)[0] is False
    assert True not in plc.values(COIL)  # the lost OK is not made up for
    pass_part(gate, "2")
    assert plc.coil(COIL)
    assert gate.status().reconnects == 1 and gate.status().problem is None and books_balance(gate)


def test_a_connection_that_the_plc_dropped_while_idle_costs_no_part(
    plc: Plc, gate_to: Callable[..., RejectOutput]
) -> None:
    gate = gate_to(plc)
    pass_part(gate, "1")
    plc.drop_connections()
    pass_part(gate, "2")
    assert plc.coil(COIL) and gate.status().lost == 0


def test_nobody_waits_for_a_plc_that_hangs(plc: Plc, gate_to: Callable[..., RejectOutput]) -> None:
    """The PLC takes requests and answers none; arming and deciding goes on while the output's thread sits in its first write."""
    gate = gate_to(plc, timeout_s=5)
    wait_until(lambda: gate.status().state == "ok")
    plc.hold()
    for n in range(1000):
        gate.arm(str(n), soon())
        gate.decide(str(n), "pass")
    wait_until(lambda: len(plc.held) > 0)
    assert plc.held == [(COIL, False)]  # 1000 parts later it is still in there
    now = gate.status()
    assert now.armed == 1000 and now.stale == 999 and books_balance(gate, open_parts=1)
    plc.release()
    wait_until(lambda: gate.status().ok == 1)
    assert plc.values(COIL).count(True) == 1


def test_a_hang_ends_in_timeouts_lost_parts_and_ng(plc: Plc, gate_to: Callable[..., RejectOutput]) -> None:
    gate = gate_to(plc, timeout_s=0.1)
    wait_until(lambda: gate.status().state == "ok")
    plc.hold()
    gate.arm("1", soon())
    gate.decide("1", "pass")
    wait_until(lambda: gate.status().code == "O-TIMEOUT")
    assert gate.status().lost == 1
    plc.release()
    wait_until(lambda: gate.status().state == "ok")
    assert plc.values(COIL)[-1] is False and True not in plc.values(COIL)


def test_a_coil_that_may_not_be_written_is_told_and_tried_again(plc: Plc, gate_to: Callable[..., RejectOutput]) -> None:
    plc.forbid = COIL
    gate = gate_to(plc)
    wait_until(lambda: gate.status().code == "O-REFUSED")
    plc.forbid = None
    wait_until(lambda: gate.status().state == "ok")
    assert gate.status().code is None


def test_closing_does_not_wait_for_a_plc_that_is_gone(plc: Plc, gate_to: Callable[..., RejectOutput]) -> None:
    gate = gate_to(plc)
    wait_until(lambda: gate.status().state == "ok")
    plc.stop()
    gate.arm("1", soon())
    assert gate.close(20) and books_balance(gate)


def test_the_end_makes_one_last_attempt_to_leave_ng(plc: Plc, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_dkm.reject.RETRY_S", 1000.0)
    monkeypatch.setattr("edge_dkm.reject.MAX_RETRY_S", 1000.0)
    gate = RejectOutput("top", ModbusOutput(settings_for(plc)))
    plc.stop()
    gate.start()
    wait_until(lambda: gate.status().state == "degraded")
    plc.initial = True
    plc.start()
    assert gate.close(20)
    assert not plc.coil(COIL)


def test_whatever_happens_ng_stands_between_two_oks_and_every_part_is_counted_once(
    plc: Plc, gate_to: Callable[..., RejectOutput]
) -> None:
    gate = gate_to(plc)
    wait_until(lambda: gate.status().state == "ok")
    verdicts: tuple[Verdict, ...] = ("pass", "pass", "reject", "review", "error")
    draw = random.Random(5)
    for n in range(400):
        gate.arm(str(n), soon(draw.choice((-1, 0.002, 1, 1000))))
        if draw.random() < 0.5:
            time.sleep(draw.choice((0.0005, 0.002)))
        gate.decide(str(n - draw.choice((0, 0, 0, 1))), draw.choice(verdicts))
        if draw.random() < 0.5:
            time.sleep(draw.choice((0.0005, 0.002)))
        if n % 50 == 49:
            plc.drop_connections()
    assert gate.close(20)
    written = plc.values(COIL)
    assert True in written and written[0] is False and written[-1] is False
    assert not any(before and after for before, after in itertools.pairwise(written))
    assert books_balance(gate) and gate.status().armed == 400


def test_an_output_that_was_never_started_is_closed_all_the_same(plc: Plc) -> None:
    assert RejectOutput("top", ModbusOutput(settings_for(plc))).close()
    assert plc.written == []


def test_the_heartbeat_goes_on_and_stops_with_the_line(plc: Plc) -> None:
    is_alive = threading.Event()
    is_alive.set()
    refusals: list[None] = []

    def ask() -> bool:
        if not is_alive.is_set():
            refusals.append(None)
        return is_alive.is_set()

    gate = RejectOutput("top", ModbusOutput(settings_for(plc, heartbeat_coil=HEARTBEAT)), is_line_alive=ask)
    gate.start()
    wait_until(lambda: len(plc.values(HEARTBEAT)) >= 4)
    assert plc.values(HEARTBEAT)[:4] == [True, False, True, False]
    is_alive.clear()
    wait_until(lambda: len(refusals) == 1)
    beats = len(plc.values(HEARTBEAT))
    gate.arm("1", soon(0.05))  # NG is written all the same
    wait_until(lambda: gate.status().late == 1 and len(refusals) >= 3)
    assert len(plc.values(HEARTBEAT)) == beats
    is_alive.set()
    wait_until(lambda: len(plc.values(HEARTBEAT)) > beats)
    assert gate.close(20)


def test_changes_of_state_are_told_once_each(plc: Plc) -> None:
    told: list[str] = []
    gate = RejectOutput("top", ModbusOutput(settings_for(plc)), changed=lambda: told.append(gate.status().state))
    gate.start()
    wait_until(lambda: told == ["ok"])
    plc.stop()
    gate.arm("1", soon())
    wait_until(lambda: len(told) == 2)
    plc.start()
    wait_until(lambda: len(told) == 3)
    assert gate.close(20)
    assert told == ["ok", "degraded", "ok", "stopped"]


class _Broken(Output):
    """An output whose driver raises what nobody expects."""

    Settings = OutputSettings

    def _open(self) -> None: ...

    def _write(self, is_ok: bool) -> None:
        raise KeyError("driver")


def test_an_error_nobody_foresaw_is_a_problem_and_not_the_end() -> None:
    gate = RejectOutput("top", _Broken(OutputSettings(kind="modbus")))
    gate.start()
    wait_until(lambda: gate.status().code == "O-ERROR" and "KeyError" in (gate.status().problem or ""))
    gate.arm("1", soon())
    gate.decide("1", "pass")
    assert gate.status().lost == 1
    assert gate.close(20)


VICTIM = """
import sys, time
from devices.outputs.modbus import ModbusOutput, ModbusSettings
from edge_dkm.reject import RejectOutput
port = int(sys.argv[1])
settings = ModbusSettings(host="127.0.0.1", port=port, coil=3, heartbeat_coil=9, heartbeat_s=0.05)
gate = RejectOutput("top", ModbusOutput(settings))
gate.start()
gate.arm("1", None)
gate.decide("1", "pass")
time.sleep(60)
"""


def test_after_kill_9_the_coil_stays_and_the_heartbeat_stops_until_the_next_start_writes_ng(
    plc: Plc, gate_to: Callable[..., RejectOutput]
) -> None:
    victim = subprocess.Popen([sys.executable, "-c", VICTIM, str(plc.port)])
    try:
        wait_until(lambda: plc.coil(COIL) and len(plc.values(HEARTBEAT)) >= 2)
    finally:
        os.kill(victim.pid, signal.SIGKILL)
        victim.wait(10)
    assert plc.coil(COIL)  # what docs/reject-output.md warns of: the PLC must watch the heartbeat
    gate = gate_to(plc)
    wait_until(lambda: gate.status().state == "ok")
    assert not plc.coil(COIL)
    beats = len(plc.values(HEARTBEAT))
    pass_part(gate)
    assert len(plc.values(HEARTBEAT)) == beats
