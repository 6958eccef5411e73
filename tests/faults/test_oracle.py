from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.faults.oracle import Line, body_crc, judge, read_lines

TOPIC = "dkm/v1/st1/top/result"


def body(n: int, **changes: Any) -> str:
    values = {
        "schema": "dkm.result/1",
        "result_id": f"r{n}",
        "camera": "top",
        "epoch": "e1",
        "seq": n,
        "cseq": n,
        "verdict": "pass",
        "historical": False,
    }
    return json.dumps(values | changes)


def gap(first: int, last: int) -> Line:
    text = {"schema": "dkm.gap/1", "camera": "top", "epoch": "e1", "seq": 99, "from": first, "to": last}
    return {"topic": TOPIC, "payload": json.dumps(text)}


def ledger(*numbers: int) -> list[Line]:
    lines: list[Line] = []
    for n in numbers:
        lines.append({"intended": f"r{n}", "camera": "top"})
        lines.append(
            {"result_id": f"r{n}", "camera": "top", "epoch": "e1", "seq": n, "cseq": n, "crc": body_crc(body(n))}
        )
    return lines


def got(*texts: str, topic: str = TOPIC) -> list[Line]:
    return [{"topic": topic, "payload": text} for text in texts]


def test_everything_once_and_in_order_is_kept() -> None:
    verdict = judge(ledger(1, 2, 3), got(body(1), body(2), body(3)))
    assert verdict.is_kept and (verdict.produced, verdict.received, verdict.duplicates) == (3, 3, 0)


def test_a_result_that_never_arrives_is_lost() -> None:
    verdict = judge(ledger(1, 2, 3), got(body(1), body(3)))
    assert verdict.lost == ["r2"] and verdict.holes == {("top", "e1"): [2]} and not verdict.is_kept


def test_the_last_result_is_lost_too_though_no_number_is_missing_before_another() -> None:
    verdict = judge(ledger(1, 2), got(body(1)))
    assert verdict.lost == ["r2"] and verdict.holes == {} and not verdict.is_kept


def test_identical_duplicates_are_harmless_even_late() -> None:
    verdict = judge(ledger(1, 2), got(body(1), body(2), body(1), body(2)))
    assert verdict.is_kept and verdict.duplicates == 2


def test_a_duplicate_that_says_something_else_is_altered() -> None:
    assert judge(ledger(1), got(body(1), body(1, verdict="reject"))).altered == ["r1"]


def test_a_duplicate_of_the_same_content_in_other_bytes_is_altered() -> None:
    assert judge(ledger(1), got(body(1), body(1).replace(" ", ""))).altered == ["r1"]


def test_a_first_copy_that_differs_from_the_ledger_is_altered() -> None:
    assert judge(ledger(1), got(body(1, verdict="reject"))).altered == ["r1"]


def test_first_copies_out_of_order_are_found() -> None:
    verdict = judge(ledger(1, 2, 3), got(body(2), body(1), body(3)))
    assert verdict.misplaced == ["r1"] and not verdict.is_kept


def test_cameras_do_not_wait_for_each_other() -> None:
    other = {"camera": "side", "cseq": 1, "result_id": "s1"}
    side = {"result_id": "s1", "camera": "side", "epoch": "e1", "seq": 2, "cseq": 1, "crc": body_crc(body(2, **other))}
    lines = got(body(1), body(3, cseq=2)) + got(body(2, **other), topic="dkm/v1/st1/side/result")
    third = ledger(3)[1] | {"cseq": 2, "crc": body_crc(body(3, cseq=2))}
    assert judge([*ledger(1), side, third], lines).is_kept


def test_an_epoch_that_has_ended_does_not_come_back() -> None:
    new = {"epoch": "e2", "cseq": 1, "result_id": "n1"}
    line = {"result_id": "n1", "camera": "top", "epoch": "e2", "seq": 3, "cseq": 1, "crc": body_crc(body(3, **new))}
    assert judge([*ledger(1, 2), line], got(body(1), body(2), body(3, **new))).is_kept
    assert judge([*ledger(1, 2), line], got(body(1), body(3, **new), body(2))).misplaced == ["r2"]


def test_a_declared_gap_accounts_for_what_is_missing() -> None:
    verdict = judge(ledger(1, 2, 3, 4), [gap(1, 2), *got(body(3), body(4))])
    assert verdict.is_kept and (verdict.declared, verdict.received, verdict.produced) == (2, 2, 4)


def test_a_gap_that_declares_what_was_received_contradicts_itself() -> None:
    assert judge(ledger(1, 2), [*got(body(1), body(2)), gap(2, 2)]).contradicted == ["r2"]


def test_a_hole_filled_by_a_replay_is_known_and_kept() -> None:
    verdict = judge(ledger(1, 2, 3), got(body(1), body(3), body(2, historical=True), body(3, historical=True)))
    assert verdict.is_kept and (verdict.replayed, verdict.duplicates) == (1, 1)


def test_a_replay_that_says_something_else_is_altered() -> None:
    assert judge(ledger(1), got(body(1), body(1, historical=True, verdict="reject"))).altered == ["r1"]


def test_a_result_that_nobody_produced_is_of_unknown_origin() -> None:
    assert judge(ledger(1), got(body(1), body(2))).unknown == ["r2"]


def test_a_result_whose_producer_died_before_confirming_it_may_arrive_or_not() -> None:
    lines = [*ledger(1), {"intended": "r2", "camera": "top"}]
    assert judge(lines, got(body(1))).is_kept
    arrived = judge(lines, got(body(1), body(2)))
    assert arrived.is_kept and (arrived.unconfirmed, arrived.produced) == (1, 2)


def test_the_backlog_on_its_own_topic_keeps_its_own_order() -> None:
    history = "dkm/v1/st1/top/history"
    live, late = got(body(3)), got(body(1, historical=True), body(2, historical=True), topic=history)
    assert judge(ledger(1, 2, 3), live + late).is_kept
    assert judge(ledger(1, 2, 3), live + late[::-1]).misplaced == ["r1"]


def test_a_torn_last_line_is_left_out_and_a_damaged_one_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_text('{"intended": "r1"}\n{"inten')
    assert list(read_lines([path])) == [{"intended": "r1"}]
    path.write_text('{"inten\n{"intended": "r1"}\n')
    with pytest.raises(ValueError, match="control character"):
        list(read_lines([path]))
