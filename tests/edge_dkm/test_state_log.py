from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from devices.sources.masking import mask_text
from edge_dkm.service.state_log import JsonFormatter, RateLimiter, TextFormatter, log_change, set_up

log = logging.getLogger("edge_dkm.test_state_log")


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture(params=["json", "text"])
def said(request: pytest.FixtureRequest) -> Iterator[io.StringIO]:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter() if request.param == "json" else TextFormatter())
    log.addHandler(handler)
    yield stream
    log.removeHandler(handler)


def test_a_change_is_one_line_of_json_with_its_fields() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    log.addHandler(handler)
    log_change(log, "C-LOST", limiter=RateLimiter(), camera="top", detail="gives no\nmore frames", since=None, n=3)
    log.removeHandler(handler)
    line = json.loads(stream.getvalue())
    assert stream.getvalue().count("\n") == 1 and line.pop("ts").endswith("Z")
    assert line == {
        "level": "warning",
        "logger": "edge_dkm.test_state_log",
        "message": 'C-LOST camera=top detail="gives no\\nmore frames" n=3',
        "code": "C-LOST",
        "camera": "top",
        "detail": "gives no\nmore frames",
        "n": 3,
    }


def test_lines_of_one_code_are_limited_and_the_rest_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    limiter = RateLimiter(max_lines=2, per_s=60, now_s=clock)
    for n in range(10):
        log_change(log, "C-LOST", limiter=limiter, n=n)
    log_change(log, "S-FULL", limiter=limiter, free_mb=1)  # another code is not held back
    clock.now_s = 60
    log_change(log, "C-LOST", limiter=limiter, n=10)
    log_change(log, "C-LOST", limiter=limiter, n=11)
    assert [record.message for record in caplog.records] == [
        "C-LOST n=0",
        "C-LOST n=1",
        "S-FULL free_mb=1",
        "C-LOST n=10 left_out=8",
        "C-LOST n=11",
    ]


def test_control_without_a_limit_every_line_is_said(caplog: pytest.LogCaptureFixture) -> None:
    limiter = RateLimiter(max_lines=1000)
    for n in range(10):
        log_change(log, "C-LOST", limiter=limiter, n=n)
    assert len(caplog.records) == 10


def test_no_password_reaches_the_log(said: io.StringIO) -> None:
    log_change(
        log,
        "C-OPEN",
        limiter=RateLimiter(),
        source="rtsp://admin:hunter2@10.0.0.7/ch1",
        detail="cannot open 'http://cam/snap?user=a&password=hunter2&x=1' or mqtts://st1:hun/te@r2@broker",
        mqtt={"username": "st1", "password": "hunter2"},
        api_token="hunter2",
        all=["rtsp://a:hunter2@h"],
    )
    log.warning("connecting to rtsp://admin:%s@10.0.0.7", "hunter2")
    try:
        raise ValueError("rtsp://admin:hunter2@10.0.0.7 is wrong")
    except ValueError:
        log.exception("failed")
    text = said.getvalue()
    assert "hunter2" not in text and "te@r2" not in text
    assert "rtsp://admin:***@10.0.0.7/ch1" in text and "password=***&x=1" in text and "user=a" in text


def test_control_a_plain_formatter_would_have_said_it() -> None:
    record = logging.LogRecord("x", logging.INFO, "x", 1, "rtsp://admin:%s@h", ("hunter2",), None)
    assert "hunter2" in logging.Formatter().format(record)
    assert "hunter2" not in TextFormatter().format(record)


@pytest.mark.parametrize("text", ["12:30 at top", "rtsp://10.0.0.7/ch1", "a@b.example", "state/st1: 50 MB free"])
def test_text_without_secrets_stays_as_it_is(text: str) -> None:
    assert mask_text(text) == text


def test_a_field_cannot_stand_in_for_what_every_line_has() -> None:
    record = logging.LogRecord("x", logging.INFO, "x", 1, "text", (), None)
    record.dkm = {"message": "other", "code": "S-FULL", "level": "none"}
    line = json.loads(JsonFormatter().format(record))
    assert (line["message"], line["message_"], line["level"]) == ("text", "other", "info")


def test_set_up_replaces_what_was_there() -> None:
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    stream = io.StringIO()
    for handler in before:
        root.removeHandler(handler)
    try:
        set_up("text", io.StringIO())
        set_up("json", stream)
        log.info("hello")
        assert json.loads(stream.getvalue())["message"] == "hello"
    finally:
        for handler in list(root.handlers):
            root.removeHandler(handler)
        for handler in before:
            root.addHandler(handler)
        root.setLevel(level)
