"""An outbox and a publisher, as a line has them: what delivery tests share."""

from __future__ import annotations

import json
from pathlib import Path

from edge_dkm.mqtt.publisher import Publisher
from edge_dkm.outbox import Draft, Limits, Numbers, Outbox
from edge_dkm.settings import LineSettings


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
        limits = Limits(max_rows=delivery.max_rows, policy=delivery.limit)
        self.outbox = Outbox(path, "st1", lambda camera: f"dkm/v1/st1/{camera}/result", limits, delivery.mode)
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
