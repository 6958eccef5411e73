"""A replay that the MES or somebody at the station asks for: refused for the same reasons, each in its own words."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edge_dkm.commands.decoder import Command, ReplayArgs
from edge_dkm.commands.handlers import line_handlers
from edge_dkm.commands.replays import ReplayError, start_replay
from edge_dkm.errors import UsageError
from edge_dkm.mqtt.delivery import Replay
from edge_dkm.mqtt.publisher import MAX_REPLAYS, Publisher
from edge_dkm.outbox import Outbox
from edge_dkm.service.admin_handlers import admin_handlers
from edge_dkm.settings import LineSettings
from tests.broker import free_port
from tests.stations import draft


@pytest.fixture
def line(make_line: Callable[..., LineSettings], tmp_path: Path) -> Iterator[Any]:
    """What a replay needs of a line: five results of `top`, none of `side`, and a publisher without a broker, so that all waits."""
    outbox = Outbox(tmp_path / "outbox.db", "st1", lambda camera: f"dkm/v1/st1/{camera}/result")
    outbox.commit([draft(n) for n in range(5)])
    publisher = Publisher(make_line(free_port()), outbox, "test")
    publisher.start()
    live = SimpleNamespace(handlers={})
    yield SimpleNamespace(captures={"top": None, "side": None}, outbox=outbox, publisher=publisher, live=live)
    publisher.stop()
    publisher.join(20)
    outbox.close()


def by_mes(line: Any, camera: str, first: int, last: int, epoch: str | None = None) -> str:
    """The code and detail of the answer."""
    asked = {"camera": camera, "epoch": epoch or line.outbox.epoch, "from": first, "to": last}
    answer = line_handlers(line)["replay"](Command("replay", "r1", ReplayArgs.model_validate(asked)))
    return f"{answer.code or 'ok'} {answer.detail}"


def at_station(line: Any, **args: object) -> Any:
    return admin_handlers(line)["replay"](args)


def test_both_are_told_what_goes_out_which_ends_with_the_newest_result(line: Any) -> None:
    assert by_mes(line, "top", 2, 99) == "ok cseq 2 to 5 go out again"
    assert at_station(line) == {"camera": "top", "from": 1, "to": 5, "sent": 5, "missing": 0}
    assert at_station(line, **{"from": 4, "to": 99}) == {"camera": "top", "from": 4, "to": 5, "sent": 2, "missing": 0}


def test_of_another_epoch_everything_is_asked_for_and_declared_missing_later(line: Any) -> None:
    assert by_mes(line, "top", 2, 99, epoch="gone") == "ok cseq 2 to 99 go out again"


@pytest.mark.parametrize(
    ("camera", "first", "last", "code", "text"),
    [
        ("front", 1, 2, "CMD-CAMERA", "there is no camera front, expected one of top, side"),
        ("top", 6, 9, "CMD-RANGE", "cseq 6 to 9 is empty, the newest of camera top is 5"),
        ("side", 1, 1, "CMD-RANGE", "cseq 1 to 1 is empty, the newest of camera side is 0"),
    ],
)
def test_both_are_refused_for_the_same_reasons(
    line: Any, camera: str, first: int, last: int, code: str, text: str
) -> None:
    assert by_mes(line, camera, first, last) == f"{code} {text}"
    with pytest.raises(ReplayError, match=text) as caught:
        at_station(line, **{"camera": camera, "from": first, "to": last})
    assert (caught.value.code, caught.value.exit_code) == (code, 2)


@pytest.mark.parametrize("value", ["x", 1.5, True, 0, -3, [1]])
def test_a_number_that_is_none_is_refused_at_the_station(line: Any, value: object) -> None:
    with pytest.raises(UsageError, match="from is .*, expected a cseq: a whole number of at least 1"):
        at_station(line, **{"from": value})


def test_more_replays_than_may_wait_are_refused(line: Any) -> None:
    for _ in range(MAX_REPLAYS):
        start_replay(line, Replay("top", line.outbox.epoch, 1, 2))
    assert by_mes(line, "top", 1, 2).startswith("CMD-BUSY")
    with pytest.raises(ReplayError, match="ask again later"):
        at_station(line)
