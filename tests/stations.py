"""An outbox and a publisher, as a line has them, and a whole line within the test's process: what tests of delivery and of lines share."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from edge_dkm import supervisor as supervisor_module
from edge_dkm.errors import EdgeError
from edge_dkm.line import Line
from edge_dkm.mqtt.publisher import Publisher
from edge_dkm.outbox import Draft, Limits, Numbers, Outbox
from edge_dkm.settings import LineSettings
from edge_dkm.supervisor import Supervisor, run_line
from tests.waiting import wait_until


def draft(n: int, camera: str = "top") -> Draft:
    def render(numbers: Numbers) -> bytes:
        return json.dumps(
            {
                "schema": "dkm.result/1",
                "result_id": f"{camera}-{n}",
                "epoch": numbers.epoch,
                "seq": numbers.seq,
                "cseq": numbers.cseq,
                "ts": "t",
                "historical": False,
            },
            separators=(",", ":"),
        ).encode()

    return Draft(camera, f"dkm/v1/st1/{camera}/result", f"{camera}-{n}", render)


class Station:
    """An outbox and a publisher, as a line has them."""

    def __init__(self, settings: LineSettings, path: Path) -> None:
        delivery = settings.delivery
        self.outbox = Outbox(
            path, "st1", lambda camera: f"dkm/v1/st1/{camera}/result", Limits.of(delivery), delivery.mode
        )
        self.publisher = Publisher(settings, self.outbox, "test")
        self.publisher.start()

    @property
    def problem(self) -> str:
        problem = self.publisher.status().problem
        return f"{problem.code} {problem.text}" if problem else ""

    def commit(self, first: int, count: int, camera: str = "top") -> None:
        for n in range(first, first + count):
            self.outbox.commit([draft(n, camera)])

    def close(self) -> None:
        self.publisher.stop()
        self.publisher.join(20)
        assert not self.publisher.is_alive()
        self.outbox.close()


class RunningLine:
    """`run_line` in a thread of this process, whose parts and constants a test may reach; `looks` counts the supervisor's rounds."""

    def __init__(self, settings: LineSettings, monkeypatch: pytest.MonkeyPatch) -> None:
        self.error: BaseException | None = None
        self.looks = 0
        found: list[Supervisor] = []

        class Watched(Supervisor):
            def __init__(self, line: Line, own_process: bool) -> None:
                super().__init__(line, own_process)
                found.append(self)

            def _look(own) -> EdgeError | None:  # noqa: N805
                self.looks += 1
                return super()._look()

        monkeypatch.setattr(supervisor_module, "Supervisor", Watched)
        monkeypatch.setattr(supervisor_module, "LOOK_EVERY_S", 0.1)
        self._thread = threading.Thread(target=self._run, args=(settings,), daemon=True)
        self._thread.start()
        wait_until(lambda: bool(found) or not self._thread.is_alive())
        self._supervisor = found[0]
        self.line: Line = found[0]._line

    def _run(self, settings: LineSettings) -> None:
        try:
            run_line(settings)
        except Exception as error:  # noqa: BLE001 (for the test to look at)
            self.error = error

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def ask_to_stop(self) -> None:
        """As SIGTERM."""
        self._supervisor._stop_asked.set()
        self.line.attention.set()

    def has_ended(self, within_s: float = 20.0) -> bool:
        """Whether it ends without being asked."""
        self._thread.join(within_s)
        return not self.is_running

    def end(self) -> bool:
        """Asks it to, and whether it did."""
        self.ask_to_stop()
        return self.has_ended()
