"""The consumer of the chaos run: the reference receiver of the documentation as it is, with a record of every message that came."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks.line.chaos_station import BASE

RECEIVER = Path(__file__).parents[2] / "docs" / "mes_receiver.py"


@dataclass(frozen=True)
class ConsumerPlan:
    """`run` counts the starts. `quick`: less patience than shipped."""

    folder: Path
    port: int
    acknowledges: bool
    run: int = 0
    quick: bool = False

    @property
    def database(self) -> Path:
        """What the receiver has committed."""
        return self.folder / "consumer.db"


def load_receiver() -> ModuleType:
    """docs/mes_receiver.py as a module."""
    spec = importlib.util.spec_from_file_location("mes_receiver", RECEIVER)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_consumer(plan: ConsumerPlan) -> None:
    """Entry point of the process: receives until it is killed."""
    receiver = load_receiver()
    if plan.quick:
        receiver.PATIENCE_S, receiver.ASK_EVERY_S = 1.0, 2.0
    words = ["127.0.0.1", str(plan.port), BASE, "--db", str(plan.database)]
    options = receiver.parse([*words, "--ack"] if plan.acknowledges else words)
    with (
        (plan.folder / f"received-{plan.run:04d}.jsonl").open("ab") as record,
        (plan.folder / "consumer.log").open("a", buffering=1) as log,
    ):
        sys.stderr = log

        class Recording(receiver.Receiver):  # type: ignore[misc, name-defined]
            def turn(self, client: Any) -> None:
                now_s = time.monotonic()
                for message in self.inbox:
                    line = {"topic": message.topic, "at_s": now_s, "payload": message.payload.decode()}
                    record.write((json.dumps(line) + "\n").encode())
                record.flush()
                super().turn(client)

        Recording(options).run()
