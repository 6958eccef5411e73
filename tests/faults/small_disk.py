"""Code on a disk of a few megabytes, a tmpfs in a mount namespace of its own, which other programs fill and empty at random.

Run as a module inside that namespace: `python -m tests.faults.small_disk SCENARIO FOLDER ...`; `run` below does so.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edge_dkm.errors import StorageError
from edge_dkm.outbox import Draft, Limits, Numbers, Outbox

SIZE = "8m"
CAMERAS = ("top", "side")


def is_permitted(folder: Path) -> bool:
    """Whether this machine lets a user mount a tmpfs in a namespace."""
    try:
        command = ["unshare", "-rm", "mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
        return subprocess.run(command, capture_output=True, timeout=20).returncode == 0
    except OSError:
        return False


def run(scenario: str, folder: Path, *arguments: object, timeout_s: float = 60) -> dict[str, Any]:
    """Runs a scenario with a small disk mounted at `folder`; what it found."""
    inner = [sys.executable, "-m", "tests.faults.small_disk", scenario, str(folder), *map(str, arguments)]
    mount = f'mount -t tmpfs -o size={SIZE} tmpfs "$0" && exec "$@"'
    command = ["unshare", "-rm", "sh", "-c", mount, str(folder), *inner]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    if done.returncode:
        raise RuntimeError(f"{scenario} ended with {done.returncode}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def open_outbox(folder: Path, policy: str = "drop_oldest", ballast_bytes: int | None = None) -> Outbox:
    class Weighed(Outbox):
        pass

    if ballast_bytes is not None:
        Weighed.ballast_bytes = ballast_bytes
    limits = Limits(max_bytes=50_000_000, policy=policy)  # type: ignore[arg-type]
    return Weighed(folder / "outbox.db", "st1", lambda camera: f"t/{camera}/result", limits, "puback")


def draft(camera: str) -> Draft:
    def render(numbers: Numbers) -> bytes:
        body = {"schema": "dkm.result/1", "camera": camera, "cseq": numbers.cseq, "pad": "x" * 600}
        return json.dumps(body).encode()

    return Draft(camera, f"t/{camera}/result", "r", render)


class Filler:
    """Another program on the same disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "other"
        self._n = 0

    def fill(self, leave_bytes: int = 0) -> None:
        """Takes all that is free but so much."""
        self.folder.mkdir(exist_ok=True)
        free = shutil.disk_usage(self.folder).free - leave_bytes
        self._n += 1
        with contextlib.suppress(OSError), (self.folder / str(self._n)).open("wb", buffering=0) as file:
            while free > 0:
                free -= file.write(bytes(min(free, 65_536)))

    def empty(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def drain(folder: Path, ballast_bytes: str) -> dict[str, Any]:
    """A backlog, the disk filled to its last page while the program was down, and then a broker that takes everything."""
    weight = int(ballast_bytes)
    box = open_outbox(folder, ballast_bytes=weight)
    for _ in range(20):
        box.commit([draft("top") for _ in range(50)])
    box.close()
    filler = Filler(folder)
    filler.fill()
    box = open_outbox(folder, ballast_bytes=weight)
    had_ballast = (folder / "outbox.db.ballast").exists()
    problem = None
    try:
        while rows := box.unsent(0, 100):
            box.mark_sent([row.seq for row in rows])
    except StorageError as error:
        problem = str(error)
    left = box.status().rows
    filler.empty()
    deadline_s = time.monotonic() + 10
    while not (restored := (folder / "outbox.db.ballast").exists()) and weight and time.monotonic() < deadline_s:
        box.trim()
        time.sleep(0.05)
    while rows := box.unsent(0, 100):
        box.mark_sent([row.seq for row in rows])
    found = {
        "had_ballast": had_ballast,
        "left": left,
        "problem": problem,
        "left_with_room": box.status().rows,
        "restored": restored,
    }
    box.close()
    return found


def starve(folder: Path, policy: str) -> dict[str, Any]:
    """The broker is away, the disk fills up under a line that goes on producing; then there is room and a broker."""
    box = open_outbox(folder, policy)
    filler = Filler(folder)
    given: list[Numbers] = []

    def produce() -> None:
        with contextlib.suppress(StorageError):
            for _ in range(2000):
                given.extend(box.commit([draft("top") for _ in range(5)]))

    box.commit([draft("top")])
    filler.fill(leave_bytes=1_000_000)
    line = threading.Thread(target=produce)
    line.start()
    if policy == "block":
        deadline_s = time.monotonic() + 60
        while not box.is_blocked and time.monotonic() < deadline_s:
            time.sleep(0.01)
        was_blocked = box.is_blocked
        filler.empty()
        box.unblock()
        line.join()
    else:
        line.join()
        was_blocked = box.is_blocked
        filler.empty()
    received, declared = set(), set()
    while rows := box.unsent(0, 500):
        for row in rows:
            _note(json.loads(row.body), received, declared)
        box.mark_sent([row.seq for row in rows])
    produced = box.last_cseq()["top"]
    found = {
        "produced": produced,
        "received": len(received),
        "declared": len(declared),
        "overlap": len(received & declared),
        "exact": received | declared == {("top", n) for n in range(1, produced + 1)},
        "blocked": was_blocked,
        "dropped": box.status().dropped,
    }
    box.close()
    return found


def _note(body: dict[str, Any], received: set[tuple[str, int]], declared: set[tuple[str, int]]) -> None:
    if body["schema"] == "dkm.gap/1":
        declared.update((body["camera"], n) for n in range(body["from"], body["to"] + 1))
    else:
        received.add((body["camera"], body["cseq"]))


def chaos(folder: Path, ledger: str, policy: str, seed: str, kills: str) -> dict[str, Any]:
    """A line that is killed at random while others fill and empty its disk; the ledger is on another disk."""
    rng = random.Random(int(seed))
    filler = Filler(folder)
    ended_itself = fills = 0
    open_outbox(folder, policy).close()  # a new one cannot be made on a full disk: that is exit 7
    for _ in range(int(kills)):
        away = rng.random() < 0.6
        child = os.fork()
        if child == 0:
            _live(folder, Path(ledger), policy, rng.getrandbits(32), away)
        until_s = time.monotonic() + rng.uniform(0.1, 0.7)
        while time.monotonic() < until_s:
            if rng.random() < 0.6:
                filler.fill(rng.choice([0, 0, 20_000, 400_000]))
                fills += 1
            else:
                filler.empty()
            time.sleep(rng.uniform(0.01, 0.08))
        if os.waitpid(child, os.WNOHANG)[0]:
            ended_itself += 1
        else:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        if rng.random() < 0.5:
            filler.empty()
    filler.empty()
    box = open_outbox(folder, policy)
    _deliver(box, Path(ledger), lambda: box.status().rows == 0)
    found = {
        "ended_itself": ended_itself,
        "fills": fills,
        "quarantined": str(box.quarantined or ""),
        **_judge(box, Path(ledger)),
    }
    box.close()
    return found


def _live(folder: Path, ledger: Path, policy: str, seed: int, is_broker_away: bool) -> None:
    """One life of the line, in a process of its own: commits until it is killed."""
    rng = random.Random(seed)
    try:
        box = open_outbox(folder, policy)
        if not is_broker_away:
            threading.Thread(target=_deliver, args=(box, ledger, lambda: False), daemon=True).start()
        with ledger.open("ab", buffering=0) as file:
            file.write(b"\n")  # ends the line at which the life before was killed
            while True:
                batch = [draft(rng.choice(CAMERAS)) for _ in range(rng.choice([1, 1, 10]))]
                for one, numbers in zip(batch, box.commit(batch), strict=True):
                    file.write(f"P {one.camera} {numbers.cseq}\n".encode())
    except BaseException as error:  # noqa: BLE001 (the test wants to know that it ended, and why)
        print(f"ended: {error!r}", file=sys.stderr, flush=True)
        os._exit(9)


def _deliver(box: Outbox, ledger: Path, is_done: Callable[[], bool]) -> None:
    """A consumer that writes down what it got before it acknowledges."""
    with ledger.open("ab", buffering=0) as file:
        file.write(b"\n")
        while not is_done():
            try:
                rows = box.unsent(0, 50)
                for row in rows:
                    file.write(b"R " + row.body + b"\n")
                box.mark_sent([row.seq for row in rows])
            except StorageError:
                time.sleep(0.02)  # as the publisher: it tries again
            else:
                time.sleep(0 if rows else 0.005)


def _judge(box: Outbox, ledger: Path) -> dict[str, Any]:
    promised, received, declared = set(), set(), set()
    for line in ledger.read_text().splitlines():
        if line.startswith("P "):
            if len(words := line.split()) == 3:
                promised.add((words[1], int(words[2])))
        elif line:
            with contextlib.suppress(json.JSONDecodeError):  # torn by kill -9, so not acknowledged: it came again
                _note(json.loads(line[2:]), received, declared)
    produced = {(camera, n) for camera, last in box.last_cseq().items() for n in range(1, last + 1)}
    return {
        "produced": len(produced),
        "promised": len(promised),
        "received": len(received),
        "declared": len(declared),
        "lost": len(promised - received - declared),
        "unaccounted": len(produced - received - declared),
        "unheard_of": len((promised | received | declared) - produced),
        "overlap": len(received & declared),
    }


SCENARIOS: dict[str, Callable[..., dict[str, Any]]] = {"drain": drain, "starve": starve, "chaos": chaos}


def main(scenario: str, folder: str, *arguments: str) -> None:
    logging.disable(logging.WARNING)
    print(json.dumps(SCENARIOS[scenario](Path(folder), *arguments)))


if __name__ == "__main__":
    main(*sys.argv[1:])
