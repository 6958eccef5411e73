from __future__ import annotations

import json
import uuid
from typing import Any

import jsonschema
import numpy as np
import pytest

from edge_dkm.contract import Cluster
from edge_dkm.errors import FrameError, InspectionError
from edge_dkm.inspector import Inspection
from edge_dkm.message import (
    MAX_RESULT_BYTES,
    MESSAGES,
    ErrorInfo,
    Gap,
    ModelInfo,
    TriggerInfo,
    new_result_id,
)
from edge_dkm.message_schema import json_schema
from edge_dkm.outbox import Numbers
from edge_dkm.results import Case, Clockings, completed, without_answer

CASE = Case(
    "0193a5c2-0000-7000-8000-000000000000",
    "st4",
    "top",
    TriggerInfo(kind="part_present", id=812),
    "2026-11-20T23:44:01.123456Z",
    100.0,
    100.1,
)
MODEL = ModelInfo(id="bracket-v7", sha256="ab" * 32, codebook="base", contract=1)
NUMBERS = Numbers("9f1c", 18234, 9017)


def inspection(**changes: Any) -> Inspection:
    cluster = Cluster(3, "scratch-left", "reject", 10, 1.0, 0.5, 0.9)
    return Inspection(
        **{
            "cluster": cluster,
            "distance": 1.8234567,
            "margin": 0.61,
            "novelty_score": 0.87,
            "novelty_threshold": 1.0,  # type: ignore[arg-type]
            "p_value": 0.21,
            "is_novel": False,
            "verdict": "reject",
            "reason": "cluster_verdict",
            "embedding": np.zeros(2, np.float32),
            **changes,
        }
    )


def valid(payload: bytes, schema: str) -> dict[str, Any]:
    message: dict[str, Any] = json.loads(payload)
    jsonschema.Draft202012Validator(json_schema(schema)).validate(message)
    return message


def test_a_completed_result_is_the_contracts_example() -> None:
    message = valid(
        completed(CASE, NUMBERS, MODEL, inspection(), Clockings(100.0004, 100.0092)).payload(), "dkm.result/1"
    )
    assert message | {"boot_id": "7f3a"} == {
        "schema": "dkm.result/1",
        "result_id": CASE.result_id,
        "epoch": "9f1c",
        "seq": 18234,
        "cseq": 9017,
        "boot_id": "7f3a",
        "ts": CASE.ts,
        "station": "st4",
        "camera": "top",
        "state": "completed",
        "trigger": {"kind": "part_present", "id": 812},
        "model": {"id": "bracket-v7", "sha256": "ab" * 32, "codebook": "base", "contract": 1},
        "cluster": {"id": 3, "name": "scratch-left", "distance": 1.82346, "margin": 0.61},
        "novelty": {"score": 0.87, "threshold": 1.0, "p_value": 0.21, "is_novel": False},
        "verdict": "reject",
        "reason": "cluster_verdict",
        "timing_ms": {"capture": 0.4, "infer": 8.8, "total": 9.2},
        "historical": False,
    }


def test_a_margin_that_does_not_exist_is_left_out() -> None:
    message = valid(
        completed(CASE, NUMBERS, MODEL, inspection(margin=None), Clockings(100.0, 100.0)).payload(), "dkm.result/1"
    )
    assert "margin" not in message["cluster"] and "part" not in message and "error" not in message


@pytest.mark.parametrize(
    ("error", "state"),
    [(FrameError("F-DECODE", "not an image"), "bad_frame"), (InspectionError("R-NONFINITE", "nan"), "failed")],
)
def test_without_an_answer_there_is_an_error_and_neither_cluster_nor_novelty(
    error: InspectionError, state: str
) -> None:
    message = valid(without_answer(CASE, NUMBERS, error, MODEL).payload(), "dkm.result/1")
    assert (message["state"], message["reason"], message["verdict"], message["error"]["code"]) == (
        state,
        state,
        "error",
        error.code,
    )
    assert "cluster" not in message and "novelty" not in message


def test_a_result_stays_below_one_kibibyte_with_the_longest_names() -> None:
    case = Case(CASE.result_id, "s" * 64, "c" * 32, CASE.trigger, CASE.ts, 0.0, 0.0)
    long_name = inspection(cluster=Cluster(999, "긁" * 60, None, 1, 1.0, 1.0, 1.0))
    model = ModelInfo(id="m" * 64, sha256="f" * 64, codebook="0123456789ab", contract=1)
    assert (
        len(completed(case, Numbers("f" * 16, 10**9, 10**9), model, long_name, Clockings(0.0, 9.99999)).payload())
        <= MAX_RESULT_BYTES
    )
    detail = InspectionError("R-RUNTIME", "오류 " * 500)
    assert len(without_answer(case, NUMBERS, detail, model).payload()) <= MAX_RESULT_BYTES + 200


def test_gap_records_are_valid_and_use_the_words_from_and_to() -> None:
    gap = Gap.model_validate(
        {
            "ts": CASE.ts,
            "station": "st4",
            "camera": "top",
            "epoch": "9f1c",
            "seq": 5,
            "from": 3,
            "to": 7,
            "n": 5,
            "reason": "drop_oldest",
        }
    )
    message = valid(gap.payload(), "dkm.gap/1")
    assert (message["from"], message["to"], message["n"]) == (3, 7, 5) and "cseq" not in message


def test_schemas_close_enumerations_allow_further_keys_and_know_no_null() -> None:
    for name in MESSAGES:
        text = json.dumps(json_schema(name))
        assert '"null"' not in text and 'additionalProperties": false' not in text
    schema = jsonschema.Draft202012Validator(json_schema("dkm.result/1"))
    good = json.loads(completed(CASE, NUMBERS, MODEL, inspection(), Clockings(0.0, 0.0)).payload())
    assert schema.is_valid({**good, "further": 1})
    assert not schema.is_valid({**good, "verdict": "maybe"}) and not schema.is_valid({**good, "cluster": None})
    for key in ("schema", "result_id", "epoch", "seq", "cseq", "ts", "verdict", "historical"):
        assert not schema.is_valid({k: v for k, v in good.items() if k != key})


def test_result_ids_are_uuids_of_version_7_and_differ() -> None:
    ids = [new_result_id() for _ in range(1000)]
    assert (
        len(set(ids)) == 1000
        and {uuid.UUID(i).version for i in ids} == {7}
        and {uuid.UUID(i).variant for i in ids} == {uuid.RFC_4122}
    )


def test_no_detail_can_break_or_outgrow_a_message() -> None:
    info = ErrorInfo(code="F-DECODE", detail="pi\udce8ce.png: not an image " + "漢" * 300)
    assert info.detail.startswith("pi?ce.png") and len(info.payload()) < 300
