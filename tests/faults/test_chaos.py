"""The short form of benchmarks/line/chaos.py, and its controls: what is known to lose must be seen to lose."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.line.chaos import Outcome, Plan, run_chaos
from tests.broker import needs_mosquitto

pytestmark = [pytest.mark.broker, needs_mosquitto]
SHORT = Plan(
    results=3000,
    kills=8,
    broker_kills=3,
    consumer_kills=2,
    faults=8,
    freezes=2,
    seed=5,
    minutes=2,
    rate_hz=800,
    quick=True,
)


def told(outcome: Outcome) -> str:
    """For the report of a failure: the seed is in the plan above."""
    return f"{outcome.verdict.rows()} {outcome.rows_left} rows left, {outcome.problems}, {dict(outcome.done)}"


def test_with_end_to_end_acknowledgement_nothing_is_lost_whatever_is_killed(tmp_path: Path) -> None:
    outcome = run_chaos(SHORT, tmp_path)
    assert outcome.is_kept, told(outcome)
    assert outcome.verdict.received >= SHORT.results - SHORT.kills * 4
    assert (outcome.done["station kills"], outcome.done["broker kills"]) == (8, 3)


def test_in_mode_journal_every_hole_is_known_and_filled_by_replay(tmp_path: Path) -> None:
    # Slower than the others: each event takes its time, and the broker must be killed while results still come.
    plan = replace(SHORT, mode="journal", results=1500, rate_hz=250, kills=3, faults=4)
    outcome = run_chaos(plan, tmp_path)
    assert outcome.is_kept, told(outcome)
    assert outcome.verdict.replayed > 0  # the kills of the broker did lose something


def test_control_deleting_at_the_brokers_acknowledgement_loses(tmp_path: Path) -> None:
    plan = replace(SHORT, mode="puback", results=1500, kills=0, consumer_kills=0, faults=0, freezes=0)
    outcome = run_chaos(plan, tmp_path)
    assert not outcome.is_kept and len(outcome.verdict.lost) + outcome.verdict.declared > 0


def test_control_the_librarys_own_queue_loses(tmp_path: Path) -> None:
    plan = replace(SHORT, naive=True, results=1500, kills=3, consumer_kills=0, faults=0, freezes=0)
    outcome = run_chaos(plan, tmp_path)
    assert not outcome.is_kept and outcome.verdict.lost
