"""Stalls injected into every stage of a running line: each must be seen within ten seconds, and healed or handed to the service manager.

Every injection has a real `edge-dkm run`, a Mosquitto and a fault proxy of its own. `seen`: the station's log or its state, alarm or
health over MQTT says that something is wrong, or the process ends non-zero. `silent`: results stop for more than ten seconds and
nothing says so. A process that has ended is started again, as systemd would, and must go on where it was.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks.table import show_table
from edge_dkm.mqtt.link import await_connack, open_link, publish
from edge_dkm.settings import MqttSettings
from tests.broker import Mosquitto, Subscriber
from tests.faults.mjpeg_camera import MjpegCamera, Mode
from tests.faults.proxy import HALF_OPEN, Fault, Proxy
from tests.faults.station import RealStation, build_model, line_settings
from tests.waiting import wait_until

SEEN_S, BACK_S = 10.0, 15.0
RESULTS_STOP_S = 1.5  # at 20 results per second: longer than any hiccup of a busy machine should be
# A line of the log that says that something is wrong; the first is how the state is logged.
ALARMING = re.compile(r"STATE state=(degraded|error|halted)|\b(WARNING|ERROR|CRITICAL)\b|^edge-dkm: ", re.MULTILINE)

FAILPOINTS = (
    "camera.read:{n}:hang",
    "camera.read:{n}:raise",
    "camera.read:{n}:kill",
    "capture.emit:{n}:hang",
    "infer:{n}:hang",
    "infer:{n}:raise",
    "inspect.thread:{n}:hang",
    "inspect.thread:{n}:raise",
    "commit.thread:{n}:hang",
    "commit.thread:{n}:raise",
    "outbox.commit:{n}:hang",  # what a locked database looks like
    "outbox.commit:{n}:raise",
    "outbox.commit:{n}:enospc+",
    "outbox.mark_sent:{n}:hang",
    "outbox.mark_sent:{n}:raise",
    "outbox.unsent:{n}:hang",
    "outbox.unsent:{n}:raise+",
    "publisher.loop:{n}:hang",
    "publisher.loop:{n}:raise",
    "publisher.settle:{n}:raise+",
    "outbox.trim:2:hang",
    "supervisor:{n}:hang",
    "supervisor:{n}:raise",
    "callback.on_publish:{n}:raise",
    "callback.on_publish:{n}:hang",
    "callback.on_connect:1:raise",
    "callback.on_subscribe:1:raise",
    "callback.on_message:1:raise",
    "callback.on_disconnect:1:raise",
)
NETWORK: dict[str, Fault] = {
    "half-open both ways": HALF_OPEN,
    "half-open upwards": Fault(swallow_up=True),
    "half-open downwards": Fault(swallow_down=True),
    "silent after a cut": Fault(silent=True),
}
CAMERA: dict[str, Mode] = {
    "camera hangs in a picture": "hang_mid_frame",
    "camera trickles": "trickle",
    "camera shows one picture": "frozen",
    "camera refuses": "refuse",
}
BROKER_STOPPED, REFUSED = "broker SIGSTOP", "broker refuses"
KINDS = (*FAILPOINTS, *NETWORK, *CAMERA, BROKER_STOPPED, REFUSED)


@dataclass(frozen=True)
class Found:
    """How one injection ended. `seen_s` after the injection; `back_s`: results again after it was cleared or the process restarted."""

    kind: str
    seen_s: float | None
    how: str
    back_s: float | None
    holes: int

    @property
    def is_kept(self) -> bool:
        """Seen in time (or never a stall), healed or ended non-zero, back in time, no result missing.

        A failure that stays (`+`) cannot be healed; to go on and say so is right.
        """
        in_time = self.how == "no stall" or (self.seen_s is not None and self.seen_s <= SEEN_S)
        is_handed_over = "ended with 0" not in self.how and ("killed by us" not in self.how or self.kind.endswith("+"))
        is_back = self.back_s is not None and self.back_s <= BACK_S
        return in_time and is_handed_over and is_back and self.holes == 0


class Injection:
    """One stall in one station of its own."""

    def __init__(self, kind: str, n: int, model: Path, folder: Path) -> None:
        self.kind, self.folder = kind, folder
        self.failpoint = kind.format(n=n) if kind in FAILPOINTS else ""
        self.broker = Mosquitto(folder)
        self.proxy = Proxy(self.broker.port)
        self.subscriber = Subscriber(self.broker.port)
        self.camera = MjpegCamera(fps=20)
        cameras = (
            f"{{top: {{source: '{self.camera.url}', policy: every, framing: any}}}}"  # live: it may not be waited for
        )
        self.settings = line_settings(model, folder / "state", self.proxy.port, cameras=cameras)

    def run(self) -> Found:
        """Start, stall, look, clear, look again."""
        try:
            with RealStation(self.settings, self.folder / "station", self.failpoint) as station:
                injected_s = self._inject(station)
                seen_s, how = self._look(station, injected_s)
                self._clear()
                back_s = self._back(station) if station.process.poll() is None else None
            if back_s is None:  # ended, or not healed within its time: what systemd does
                code = station.process.returncode
                how += (
                    ", still there and killed by us" if code == -signal.SIGKILL else f", ended with {code}, restarted"
                )
                with RealStation(self.settings, self.folder / "again") as again:
                    back_s = self._back(again)
            return Found(self.kind, None if seen_s is None else seen_s - injected_s, how, back_s, self._holes())
        finally:
            self._clear()
            self.subscriber.close()
            self.proxy.close()
            self.broker.kill()
            self.camera.close()

    def _inject(self, station: RealStation) -> float:
        """When it happened."""
        if self.failpoint:
            point = self.failpoint.split(":")[0]
            if point in ("callback.on_message", "callback.on_disconnect"):
                wait_until(lambda: len(self._cseqs()) > 20, 60)
                self._provoke(point)
            wait_until(lambda: station.hit_s(point) is not None or station.process.poll() is not None, 60)
            return station.hit_s(point) or time.monotonic()
        wait_until(lambda: len(self._cseqs()) > 20, 60)
        if self.kind == BROKER_STOPPED:
            self._signal_broker(signal.SIGSTOP)
        elif self.kind == REFUSED:
            self.proxy.down()
        elif self.kind in CAMERA:
            self.camera.mode = CAMERA[self.kind]
        else:
            self.proxy.set(NETWORK[self.kind])
            if NETWORK[self.kind].silent:
                self.proxy.cut()
        return time.monotonic()

    def _provoke(self, point: str) -> None:
        """Makes the MQTT library call the callback."""
        if point == "callback.on_disconnect":
            self.proxy.cut()
            return
        settings = MqttSettings(host="127.0.0.1", port=self.broker.port)
        link = open_link(settings, "mes", clean=True)
        await_connack(link, settings)
        publish(link, "dkm/v1/st1/cmd/pause", b"{}", qos=0)
        link.client.disconnect()

    def _look(self, station: RealStation, injected_s: float) -> tuple[float | None, str]:
        """When and how something was wrong to see; after the time has passed, whether results had stopped."""
        before, messages = len(station.log()) if not self.failpoint else 0, len(self.subscriber.messages)
        if self.failpoint:
            before = self._log_before(station)
        deadline_s = injected_s + SEEN_S + 3.0
        went_on_s = injected_s
        count = len(self._cseqs())
        while time.monotonic() < deadline_s:
            if station.process.poll() is not None:
                return (
                    time.monotonic(),
                    "exit",
                )
            if ALARMING.search(station.log()[before:]):
                return time.monotonic(), "log and state"
            if self._is_said(messages):
                return time.monotonic(), "mqtt"
            if len(self._cseqs()) > count:
                count, went_on_s = len(self._cseqs()), time.monotonic()
            time.sleep(0.05)
        if time.monotonic() - went_on_s < RESULTS_STOP_S:
            return None, "no stall"
        return None, "SILENT"

    def _log_before(self, station: RealStation) -> int:
        """Where the log stood when a healthy line had started; what came later may speak of the injection."""
        found = station.log().find("STATE state=running")
        return max(0, found)

    def _is_said(self, after: int) -> bool:
        for _, payload, _ in self.subscriber.messages[after:]:
            schema = payload.get("schema")
            if schema == "dkm.state/1" and payload["state"] in ("degraded", "error"):
                return True
            if schema == "dkm.alarm/1" and payload["active"]:
                return True
            stages = payload.get("stages", {}).values() if schema == "dkm.health/1" else ()
            if any(stage["state"] in ("stuck", "degraded") for stage in stages):
                return True
        return False

    def _clear(self) -> None:
        self.proxy.heal()
        self.camera.mode = "ok"
        self._signal_broker(signal.SIGCONT)
        if self.kind == BROKER_STOPPED:  # the consumer, too, has given it up and comes back
            gone, self.subscriber = self.subscriber, Subscriber(self.broker.port)
            self.subscriber.messages[:0] = gone.messages
            gone.close()

    def _back(self, station: RealStation) -> float | None:
        """Seconds until five new results have come; None where the process ended or it took too long."""
        started_s, count = time.monotonic(), len(self._cseqs())
        while time.monotonic() - started_s < BACK_S:
            if len(self._cseqs()) >= count + 5:
                return time.monotonic() - started_s
            if station.process.poll() is not None:
                return None
            time.sleep(0.05)
        return None

    def _signal_broker(self, number: signal.Signals) -> None:
        process = self.broker._process
        if process is not None:
            os.kill(process.pid, number)

    def _cseqs(self) -> set[int]:
        """Numbers of the results that have arrived."""
        return {m["cseq"] for _, m, _ in list(self.subscriber.messages) if m.get("schema") == "dkm.result/1"}

    def _holes(self) -> int:
        """Below the newest, after it had time to close."""
        time.sleep(0.5)
        seen = self._cseqs()
        return max(seen, default=0) - len(seen)


def inject_all(count: int, seed: int, parallel: int, report: Callable[[Found], None]) -> list[Found]:
    """Every kind in turn, each at a random moment."""
    rng = random.Random(seed)
    wanted = [(KINDS[i % len(KINDS)], rng.randint(30, 90)) for i in range(count)]
    lock = threading.Lock()
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(parallel) as pool:
        model = build_model(Path(name))

        def one(number: int) -> Found:
            folder = Path(name) / str(number)
            folder.mkdir()
            kind, n = wanted[number]
            found = Injection(kind, n, model, folder).run()
            with lock:
                report(found)
            return found

        return list(pool.map(one, range(count)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--injections", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--parallel", type=int, default=2)
    parser.add_argument("--only", help="kinds that contain this text")
    arguments = parser.parse_args()
    if arguments.only:
        global KINDS
        KINDS = tuple(kind for kind in KINDS if arguments.only in kind)
    found = inject_all(arguments.injections, arguments.seed, arguments.parallel, lambda one: print(one, flush=True))
    rows: list[list[object]] = []
    for kind in dict.fromkeys(one.kind for one in found):
        of = [one for one in found if one.kind == kind]
        seen = [one.seen_s for one in of if one.seen_s is not None]
        back = [one.back_s for one in of if one.back_s is not None]
        how = ", ".join(sorted({one.how for one in of}))
        cells = [kind, len(of), max(seen, default=0.0), how, max(back, default=float("nan"))]
        rows.append([*cells, sum(one.holes for one in of), all(one.is_kept for one in of)])
    silent = sum("SILENT" in one.how for one in found)
    show_table(
        f"{len(found)} stalls, seed {arguments.seed}: {silent} silent; seen asked within {SEEN_S:g} s, back within {BACK_S:g} s",
        ["stall", "times", "seen s (max)", "how", "back s (max)", "holes", "kept"],
        rows,
    )
    sys.exit(0 if all(one.is_kept for one in found) else 1)


if __name__ == "__main__":
    main()
