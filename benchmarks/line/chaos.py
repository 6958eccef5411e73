"""Everything is killed again and again, and nothing may be lost: station, broker and consumer by SIGKILL, the network by a fault proxy.

A station process (outbox, publisher, four producers) sends through a fault proxy to Mosquitto; the reference receiver consumes. The
verdict is the oracle's, which compares the producers' ledger with the consumer's record. Exit 1 if the promise is broken.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import random
import signal
import sqlite3
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from benchmarks.line.chaos_consumer import ConsumerPlan, run_consumer
from benchmarks.line.chaos_station import CAMERAS, ROWS, StationPlan, run_station
from benchmarks.table import show_table
from tests.broker import Mosquitto
from tests.faults.oracle import Verdict, judge, read_lines
from tests.faults.proxy import HALF_OPEN, Fault, Proxy
from tests.waiting import wait_until

POLL_S = 0.01
# The answers to 40 results: the broker sends 20 to a consumer that stands still, and keeps the others.
HELD_BYTES = 40 * 4
SETTLE_S = 240.0  # for what waits to be delivered and asked for again, at the end
FAULTS = (
    Fault(latency_s=0.05),
    Fault(bytes_per_s=20_000),
    Fault(slice_bytes=7),
    Fault(limit_bytes=20_000),
    Fault(first_answer_s=0.5),
    Fault(slow_close_s=0.3),
    Fault(silent=True),
    HALF_OPEN,
    Fault(swallow_up=True),
    Fault(swallow_down=True),
)


@dataclass(frozen=True)
class Plan:
    """What happens. `rate_hz` is of all cameras together; `naive`: the control without an outbox."""

    results: int = 100_000
    kills: int = 200
    broker_kills: int = 50
    consumer_kills: int = 20
    faults: int = 100
    freezes: int = 20
    mode: str = "e2e"
    seed: int = 1
    minutes: float = 30.0
    rate_hz: float = 500.0
    quick: bool = False
    naive: bool = False


@dataclass
class Outcome:
    """`rows_left`: in the outbox at the end. `done` counts the events; `problems` says what kept the run from its end."""

    verdict: Verdict
    rows_left: int
    seconds: float
    done: Counter[str]
    in_database: int
    problems: list[str] = field(default_factory=list)

    @property
    def is_kept(self) -> bool:
        """Whether nothing was lost or dropped, nothing waits, and the consumer's database holds all that its record says."""
        return (
            self.verdict.is_kept
            and self.verdict.declared == 0
            and self.rows_left == 0
            and self.in_database == self.verdict.received
            and not self.problems
        )


class Chaos:
    """One run in `folder`."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.plan, self.folder = plan, folder
        self.random = random.Random(plan.seed)
        # A server that has everything imported starts a process in milliseconds, so that kills meet work and not imports.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["benchmarks.line.chaos_consumer", "benchmarks.line.chaos_station"])
        self.shared = self._context.RawArray("q", 2 * len(CAMERAS) + 1)
        self.broker = Mosquitto(folder, "allow_anonymous true\nmax_inflight_messages 20\n")
        self.proxy = Proxy(self.broker.port)
        station_rate_hz = plan.rate_hz / len(CAMERAS)
        self._station_plan = StationPlan(
            folder,
            self.proxy.port,
            plan.mode,
            plan.results // len(CAMERAS) + plan.kills,  # a kill may cut off one that each camera has begun
            station_rate_hz,
            quick=plan.quick,
            naive=plan.naive,
        )
        self._consumer_plan = ConsumerPlan(folder, self.broker.port, plan.mode == "e2e", quick=plan.quick)
        self.done: Counter[str] = Counter()
        self.consumer = self._start_consumer()
        wait_until(lambda: "Success" in read_text(folder / "consumer.log"))
        # Its subscription follows; a result that came before it would be lost in the control without any kill.
        time.sleep(0.2)
        self.station = self._start_station()
        self._healers: list[threading.Timer] = []

    def run(self) -> Outcome:
        """All events at random moments of the production, then the rest of the delivery, then the verdict."""
        started_s = time.monotonic()
        deadline_s = started_s + self.plan.minutes * 60
        problems: list[str] = []
        try:
            for at, event in self._schedule():
                if not self._until(lambda at=at: sum(self.shared[: len(CAMERAS)]) >= at, deadline_s):  # type: ignore[misc]
                    problems.append(f"production stands at {sum(self.shared[: len(CAMERAS)])} of {self.plan.results}")
                    break
                event()
            self._heal()
            target = self._station_plan.per_camera * len(CAMERAS)
            produced = self._until(lambda: sum(self.shared[: len(CAMERAS)]) >= target, deadline_s)
            settle_s = min(deadline_s, time.monotonic() + (1.0 if self.plan.naive else SETTLE_S))
            if not (produced and self._until(self._is_settled, settle_s)) and not self.plan.naive:
                problems.append(f"not settled: {list(self.shared)}, the consumer has {self._streams()}")
        finally:
            self._end()
        verdict = judge(
            read_lines(sorted(self.folder.glob("ledger-*"))), read_lines(sorted(self.folder.glob("received-*")))
        )
        seconds = time.monotonic() - started_s
        return Outcome(
            verdict, self.shared[ROWS], seconds, self.done, len(self._rows("result_id FROM result")), problems
        )

    def _schedule(self) -> list[tuple[int, Callable[[], None]]]:
        kinds: list[tuple[int, Callable[[], None]]] = [
            (self.plan.kills, self._kill_station),
            (self.plan.broker_kills, self._kill_broker),
            (self.plan.consumer_kills, self._kill_consumer),
            (self.plan.faults, self._disturb),
            (self.plan.freezes, self._freeze),
        ]
        target = self._station_plan.per_camera * len(CAMERAS)
        events = [(self.random.randrange(1, target), event) for count, event in kinds for _ in range(count)]
        return sorted(events, key=lambda pair: pair[0])

    def _start_station(self) -> BaseProcess:
        plan = replace(self._station_plan, run=self.done["station starts"])
        self.done["station starts"] += 1
        return self._start(run_station, plan, self.shared)

    def _start_consumer(self) -> BaseProcess:
        plan = replace(self._consumer_plan, run=self.done["consumer starts"])
        self.done["consumer starts"] += 1
        return self._start(run_consumer, plan)

    def _start(self, target: Callable[..., None], *arguments: Any) -> BaseProcess:
        process = self._context.Process(target=target, args=arguments, daemon=True)
        process.start()
        return process

    def _kill_station(self) -> None:
        kill(self.station)
        self.done["station kills"] += 1
        self.station = self._start_station()
        self._pause(0.05, 0.4)

    def _kill_broker(self) -> None:
        """While the consumer stands still and, where results flow, once the broker has taken some for it: it must have something to lose."""
        with frozen(self.consumer):
            held_bytes = self.proxy.answered_bytes + HELD_BYTES
            self._pause(0.05, 0.3)
            self._until(lambda: self.proxy.answered_bytes >= held_bytes, time.monotonic() + 1.0)
            self.broker.kill()
        self.done["broker kills"] += 1
        self._pause(0.0, 0.2)
        self.broker.start()

    def _kill_consumer(self) -> None:
        kill(self.consumer)
        self.done["consumer kills"] += 1
        self._pause(0.0, 0.3)
        self.consumer = self._start_consumer()

    def _disturb(self) -> None:
        self._heal()
        self.done["network faults"] += 1
        choice = self.random.randrange(len(FAULTS) + 3)
        if choice < len(FAULTS):
            self.proxy.set(FAULTS[choice])
        else:
            (self.proxy.reset_peer, self.proxy.cut, self.proxy.down)[choice - len(FAULTS)]()
        healer = threading.Timer(self.random.uniform(0.1, 1.0), self.proxy.heal)
        healer.start()
        self._healers.append(healer)

    def _heal(self) -> None:
        for healer in self._healers:
            healer.join()
        self._healers = []
        self.proxy.heal()

    def _freeze(self) -> None:
        self.done["freezes"] += 1
        with frozen(self.random.choice([self.station, self.consumer])):
            self._pause(0.1, 0.6)

    def _pause(self, least_s: float, most_s: float) -> None:
        time.sleep(self.random.uniform(least_s, most_s))

    def _until(self, is_so: Callable[[], bool], deadline_s: float) -> bool:
        """Whether it became so; a station or consumer that ends by itself counts as a problem."""
        while not is_so():
            if time.monotonic() > deadline_s or not (self.station.is_alive() and self.consumer.is_alive()):
                return False
            time.sleep(POLL_S)
        return True

    def _is_settled(self) -> bool:
        """The outbox is empty and the consumer has, or knows to be dropped, everything up to the newest of each camera."""
        if self.shared[ROWS]:
            return False
        wanted = {camera: self.shared[len(CAMERAS) + n] for n, camera in enumerate(CAMERAS)}
        time.sleep(0.1)  # the database is the consumer's; looking at it must not keep it busy
        return self._streams() == wanted and self.shared[ROWS] == 0

    def _streams(self) -> dict[str, int]:
        return dict(self._rows("camera, cseq FROM stream"))

    def _rows(self, what: str) -> list[Any]:
        if not self._consumer_plan.database.exists():
            return []
        with contextlib.closing(sqlite3.connect(self._consumer_plan.database, timeout=30)) as db:
            try:
                return db.execute(f"SELECT {what}").fetchall()
            except sqlite3.OperationalError:  # no table yet
                return []

    def _end(self) -> None:
        self.proxy.heal()
        if self.station.is_alive():
            self.station.terminate()
            self.station.join(30)
        for process in (self.station, self.consumer):
            kill(process)
        for healer in self._healers:
            healer.join()
        self.proxy.close()
        self.broker.kill()


@contextlib.contextmanager
def frozen(process: BaseProcess) -> Any:
    """SIGSTOP, and SIGCONT at the end."""
    assert process.pid is not None
    os.kill(process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process.pid, signal.SIGCONT)


def kill(process: BaseProcess) -> None:
    """SIGKILL, and its resources with it."""
    process.kill()
    process.join()


def read_text(path: Path) -> str:
    """Of a file that may not be there yet."""
    return path.read_text() if path.exists() else ""


def run_chaos(plan: Plan, folder: Path) -> Outcome:
    """One run; every process and thread is gone when it returns."""
    return Chaos(plan, folder).run()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in Plan.__dataclass_fields__.items():
        kind = type(value.default)
        if kind is bool:
            parser.add_argument(f"--{name}", action="store_true")
        else:
            parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=value.default)
    plan = Plan(**vars(parser.parse_args()))
    with tempfile.TemporaryDirectory() as folder:
        outcome = run_chaos(plan, Path(folder))
    rows: list[list[object]] = [[*pair] for pair in outcome.verdict.rows()]
    rows += [["left in the outbox", outcome.rows_left], ["in the consumer's database", outcome.in_database]]
    rows += [[name, count] for name, count in sorted(outcome.done.items())] + [["seconds", outcome.seconds]]
    rows += [["problem", problem] for problem in outcome.problems]
    show_table(f"chaos, mode {plan.mode}, {len(CAMERAS)} cameras, seed {plan.seed}", ["what", "count"], rows)
    print("\nthe promise is " + ("kept" if outcome.is_kept else "BROKEN"))
    sys.exit(0 if outcome.is_kept else 1)


if __name__ == "__main__":
    main()
