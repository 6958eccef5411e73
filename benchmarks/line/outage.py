"""The consumer or the broker is away for an hour's worth of results: nothing is lost, or it is declared, and the backlog drains fast.

* e2e, journal: the consumer is away, Mosquitto has its defaults (a queue of 1,000) and is killed meanwhile; puback is the control.
* limits: the broker is away and the outbox may hold a tenth of what comes: received + declared = produced.
* live_first: a backlog drains to `history`, marked historical, while new results go first.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.line.chaos_consumer import ConsumerPlan, run_consumer
from benchmarks.line.chaos_station import CAMERAS, ROWS, StationPlan, run_station
from benchmarks.table import show_table
from tests.broker import Mosquitto
from tests.faults.oracle import Verdict, judge, read_lines
from tests.waiting import wait_until

FAST_HZ = 100_000.0  # as fast as the disk takes them
LIVE_HZ = 30.0
DRAIN_ASKED_HZ, LIVE_ASKED_S = 2000, 2.0
PATIENCE_S = 900.0


class Site:
    """Broker, station and consumer of one scenario, each started and killed on its own."""

    def __init__(self, folder: Path, mode: str, delivery: str = "") -> None:
        self.folder = folder
        self.broker = Mosquitto(folder)
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["benchmarks.line.chaos_consumer", "benchmarks.line.chaos_station"])
        self.shared = self._context.RawArray("q", 2 * len(CAMERAS) + 1)
        self.plan = StationPlan(folder, self.broker.port, mode, 0, FAST_HZ, delivery=delivery)
        self._consumer_plan = ConsumerPlan(folder, self.broker.port, mode == "e2e")
        self._running: dict[str, BaseProcess] = {}
        self._starts = 0

    def start_station(self, results: int, rate_hz: float) -> None:
        """It goes on until `results` in all were begun."""
        plan = replace(self.plan, run=self._starts, per_camera=results // len(CAMERAS), rate_hz=rate_hz / len(CAMERAS))
        self._start("station", run_station, plan, self.shared)

    def stop_station(self) -> None:
        """In order."""
        process = self._running.pop("station")
        process.terminate()
        process.join(60)

    def start_consumer(self) -> None:
        """With the database of its last life."""
        self._start("consumer", run_consumer, replace(self._consumer_plan, run=self._starts))

    def kill(self, name: str) -> None:
        """SIGKILL."""
        if name in self._running:
            process = self._running.pop(name)
            process.kill()
            process.join()

    def pid(self, name: str) -> int:
        """Of a running process."""
        number = self._running[name].pid
        assert number is not None
        return number

    def close(self) -> None:
        """Ends all three."""
        for name in ("station", "consumer"):
            self.kill(name)
        self.broker.kill()

    def wait_produced(self, results: int) -> None:
        """Until so many were committed, or the outbox does not take more."""
        wait_until(lambda: sum(self.shared[: len(CAMERAS)]) >= results, PATIENCE_S)
        time.sleep(0.2)  # the last ones' ledger lines, and the shared numbers

    def wait_settled(self) -> float:
        """Until the outbox is empty and the consumer has accounted for everything; seconds since the outbox began to shrink.

        Infinite where it does not come to that; the oracle then says what is missing.
        """
        rows = self.shared[ROWS]
        try:
            wait_until(lambda: self.shared[ROWS] < rows or rows == 0, PATIENCE_S)
            started_s = time.monotonic()
            wait_until(lambda: self.shared[ROWS] == 0 and self._is_complete(), PATIENCE_S)
        except AssertionError:
            return float("inf")
        return time.monotonic() - started_s

    def verdict(self) -> Verdict:
        """The oracle's."""
        ledger, received = sorted(self.folder.glob("ledger-*")), sorted(self.folder.glob("received-*"))
        return judge(read_lines(ledger), read_lines(received))

    def received(self) -> Iterator[dict[str, Any]]:
        """What came, in order."""
        return read_lines(sorted(self.folder.glob("received-*")))

    def _is_complete(self) -> bool:
        time.sleep(0.1)  # the database is the consumer's; looking at it must not keep it busy
        wanted = {camera: self.shared[len(CAMERAS) + n] for n, camera in enumerate(CAMERAS)}
        with contextlib.closing(sqlite3.connect(self._consumer_plan.database, timeout=30)) as db:
            try:
                return dict(db.execute("SELECT camera, cseq FROM stream")) == wanted
            except sqlite3.OperationalError:  # no table yet
                return False

    def _start(self, name: str, target: Callable[..., None], *arguments: Any) -> None:
        self._starts += 1
        process = self._context.Process(target=target, args=arguments, daemon=True)
        process.start()
        self._running[name] = process


@contextlib.contextmanager
def site(mode: str, delivery: str = "") -> Iterator[Site]:
    """A scenario in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        place = Site(Path(folder), mode, delivery)
        try:
            yield place
        finally:
            place.close()


@dataclass(frozen=True)
class Row:
    """One line of the table; `is_kept`: whether it is as promised."""

    cells: list[object]
    is_kept: bool


def consumer_away(mode: str, results: int) -> Row:
    """The consumer subscribes, goes, and comes back when all is produced; the broker is killed in between."""
    with site(mode) as place:
        place.start_consumer()
        wait_until(lambda: "Success" in log_of(place))
        time.sleep(0.3)
        place.kill("consumer")
        place.start_station(results, FAST_HZ)
        place.wait_produced(results // 2)
        place.broker.kill()
        place.broker.start()
        place.wait_produced(results)
        place.start_consumer()
        seconds = place.wait_settled()
        place.stop_station()
        verdict = place.verdict()
    rate_hz = verdict.received / seconds
    is_kept = verdict.is_kept and verdict.declared == 0 and (mode != "e2e" or rate_hz >= DRAIN_ASKED_HZ)
    return Row([f"consumer away, broker killed, {mode}", *counts(verdict), seconds, rate_hz], is_kept)


def limited(mode: str, policy: str, results: int) -> Row:
    """The broker is away; the outbox may hold a tenth."""
    with site(mode, f", limit: {policy}, max_rows: {results // 10}") as place:
        place.broker.kill()
        place.start_station(results, FAST_HZ)
        place.wait_produced(results // 10 if policy == "block" else results)
        place.broker.start()
        place.start_consumer()
        started_s = time.monotonic()
        place.wait_produced(results)
        seconds = place.wait_settled()
        if policy == "block":  # it drains while it is being filled
            seconds = time.monotonic() - started_s
        place.stop_station()
        verdict = place.verdict()
    is_kept = verdict.is_kept and (verdict.declared == 0) == (policy == "block")
    return Row(
        [f"limit {results // 10}, {policy}, {mode}", *counts(verdict), seconds, verdict.received / seconds], is_kept
    )


def live_first(results: int) -> tuple[Row, list[object]]:
    """Backlog first, on its own topic; latency of the results made while it drains."""
    with site("journal", ", order: live_first") as place:
        place.broker.kill()
        place.start_station(results, FAST_HZ)
        place.wait_produced(results)
        place.stop_station()
        place.broker.start()
        place.start_consumer()
        wait_until(lambda: "Success" in log_of(place))
        time.sleep(0.3)
        started_s = time.monotonic()
        place.start_station(results + int(LIVE_HZ * 10), LIVE_HZ)
        place.wait_produced(results + int(LIVE_HZ * 10))
        place.wait_settled()
        place.stop_station()
        verdict, ages, drained_s = place.verdict(), list[float](), started_s
        for line in place.received():
            body = json.loads(line["payload"])
            if body.get("schema") != "dkm.result/1":
                continue
            if body["made_s"] >= started_s and not body["historical"]:  # made before the connection stood: backlog
                ages.append(line["at_s"] - body["made_s"])
            elif body["made_s"] < started_s and not body["historical"]:
                verdict.unknown.append(f"{body['result_id']} is backlog and not marked so")
            else:
                drained_s = max(drained_s, line["at_s"])
    seconds, p99_s = drained_s - started_s, float(np.percentile(ages, 99))
    row = Row(
        ["live_first, backlog", *counts(verdict), seconds, results / seconds],
        verdict.is_kept and p99_s <= LIVE_ASKED_S,
    )
    return row, [len(ages), float(np.percentile(ages, 50)), p99_s, max(ages), f"<= {LIVE_ASKED_S:g}"]


def log_of(place: Site) -> str:
    """What the receiver has said."""
    path = place.folder / "consumer.log"
    return path.read_text() if path.exists() else ""


def counts(verdict: Verdict) -> list[object]:
    """Produced, received, declared, lost, wrong otherwise."""
    wrong = len(verdict.altered) + len(verdict.misplaced) + len(verdict.unknown) + len(verdict.contradicted)
    return [verdict.produced, verdict.received, verdict.declared, len(verdict.lost), wrong]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=int, default=100_000, help="an hour at 28 per second")
    parser.add_argument("--limited", type=int, default=20_000, help="results of the runs with limits")
    arguments = parser.parse_args()
    rows = [consumer_away(mode, arguments.results) for mode in ("e2e", "journal")]
    rows += [
        limited(mode, policy, arguments.limited)
        for mode in ("journal", "e2e")
        for policy in ("drop_oldest", "drop_newest", "block")
    ]
    live, latency = live_first(arguments.results)
    rows.append(live)
    control = consumer_away("puback", min(5000, arguments.results))
    header = ["scenario", "produced", "received", "declared", "lost", "otherwise wrong", "s", "results/s", "kept"]
    table = [[*row.cells, row.is_kept] for row in rows]
    table.append([f"control: {control.cells[0]}", *control.cells[1:], f"{control.is_kept} (must be False)"])
    show_table(f"outages (drain asked: >= {DRAIN_ASKED_HZ} results/s in e2e)", header, table)
    show_table("live results while the backlog drains, s", ["results", "p50", "p99", "max", "asked"], [latency])
    sys.exit(0 if all(row.is_kept for row in rows) and not control.is_kept else 1)


if __name__ == "__main__":
    main()
