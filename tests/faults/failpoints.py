"""Failures at named places of the real program, from outside: no hook in production code.

`PYTHONFAILPOINTS` holds `point:n:action`, separated by commas: at its n-th call the place does `kill`, `raise`, `hang` or `enospc`
instead of its work; `raise+` and `enospc+` do it at every later call, too. `PYTHONFAILPOINTSDIR` is a folder: each point fails in one
process only, the first that gets there, and leaves `<point>.hit` with the time of the monotonic clock.
(The names begin with PYTHON since camera processes inherit nothing else.) Standard library only: it runs before the program.
"""

from __future__ import annotations

import errno
import functools
import importlib.abc
import importlib.machinery
import importlib.util
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

POINTS_VARIABLE, FOLDER_VARIABLE = "PYTHONFAILPOINTS", "PYTHONFAILPOINTSDIR"
# point -> module, name within it. A callback is wrapped where it is given to the MQTT library.
POINTS = {
    "outbox.commit": ("edge_dkm.outbox.outbox", "Outbox.commit"),
    "outbox.intend": ("edge_dkm.outbox.outbox", "Outbox.intend"),
    "outbox.mark_sent": ("edge_dkm.outbox.outbox", "Outbox.mark_sent"),
    "outbox.unsent": ("edge_dkm.outbox.outbox", "Outbox.unsent"),
    "outbox.trim": ("edge_dkm.outbox.outbox", "Outbox.trim"),
    "publisher.loop": ("edge_dkm.mqtt.publisher", "pump"),
    "publisher.settle": ("edge_dkm.mqtt.delivery", "Flight.settle"),
    "infer": ("edge_dkm.inspector", "Inspector.inspect"),
    "camera.read": ("devices.observation", "_shaped"),
    "capture.emit": ("edge_dkm.pipeline", "Pipeline.take"),
    "commit.thread": ("edge_dkm.pipeline", "Pipeline._next_batch"),
    "inspect.thread": ("edge_dkm.inspecting", "Inspecting._together"),
    "supervisor": ("edge_dkm.supervisor", "Supervisor._look"),
    "admin": ("edge_dkm.service.admin", "_Conversation._answer"),
    "callback.on_publish": ("edge_dkm.mqtt.link", "_listen"),
    "callback.on_message": ("edge_dkm.mqtt.link", "_listen"),
    "callback.on_connect": ("edge_dkm.mqtt.link", "_listen"),
    "callback.on_disconnect": ("edge_dkm.mqtt.link", "_listen"),
    "callback.on_subscribe": ("edge_dkm.mqtt.link", "_listen"),
}
ACTIONS = ("kill", "raise", "hang", "enospc", "raise+", "enospc+")


@dataclass
class Failpoint:
    """One place: counts its calls and fails at the n-th."""

    point: str
    at_call: int
    action: str
    calls: int = 0
    is_on: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def reached(self) -> None:
        """Called before the real work; raises, hangs or kills when it is time."""
        with self.lock:
            self.calls += 1
            if self.calls == self.at_call:
                self.is_on = self._claim()
            elif not self.action.endswith("+"):
                return
            if not self.is_on:
                return
        if self.action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.action == "hang":
            threading.Event().wait()
        elif self.action.startswith("enospc"):
            raise OSError(errno.ENOSPC, f"failpoint {self.point}")
        else:
            raise RuntimeError(f"failpoint {self.point}")

    def _claim(self) -> bool:
        """Whether no other process has failed here yet."""
        folder = os.environ.get(FOLDER_VARIABLE)
        if folder is None:
            return True
        try:
            with Path(folder, f"{self.point}.hit").open("x") as file:
                file.write(str(time.monotonic()))
        except FileExistsError:
            return False
        return True


def parse(text: str) -> list[Failpoint]:
    """`point:n:action,..`.

    Raises:
        ValueError: a point or action that is not known.
    """
    found = []
    for item in filter(None, text.split(",")):
        point, at_call, action = item.split(":")
        if point not in POINTS or action not in ACTIONS:
            raise ValueError(
                f"failpoint {item}, expected point:n:action with a point of {sorted(POINTS)} and {ACTIONS}"
            )
        found.append(Failpoint(point, int(at_call), action))
    return found


def install(points: Sequence[Failpoint]) -> None:
    """Wraps the places as their modules are imported."""
    for point in points:
        module, name = POINTS[point.point]
        wrap = _wrap_callback if point.point.startswith("callback.") else _wrap_call
        sys.meta_path.insert(0, _Finder(module, functools.partial(wrap, name=name, point=point)))


class _Finder(importlib.abc.MetaPathFinder):
    """Changes one module right after its import."""

    def __init__(self, module: str, change: Callable[[ModuleType], None]) -> None:
        self._module, self._change, self._busy = module, change, False

    def find_spec(
        self, fullname: str, path: Any, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._module or self._busy:
            return None
        self._busy = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._busy = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                self._change(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _wrap_call(module: ModuleType, *, name: str, point: Failpoint) -> None:
    owner: Any = module
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    setattr(owner, last, _failing(getattr(owner, last), point))


def _wrap_callback(module: ModuleType, *, name: str, point: Failpoint) -> None:
    listen = getattr(module, name)
    callback = point.point.split(".")[1]

    def listen_and_fail(link: Any, *more: Any) -> None:
        listen(link, *more)
        setattr(link.client, callback, _failing(getattr(link.client, callback), point))

    setattr(module, name, listen_and_fail)


def _failing(work: Callable[..., Any], point: Failpoint) -> Callable[..., Any]:
    @functools.wraps(work)
    def reached(*arguments: Any, **named: Any) -> Any:
        point.reached()
        return work(*arguments, **named)

    return reached


def environment(points: str, folder: Path) -> dict[str, str]:
    """The variables for a child of ours, whose Python loads this file by itself: `folder` holds what it needs and the `.hit` files."""
    parse(points)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(
        "import importlib.util, os, sys\n"
        f"spec = importlib.util.spec_from_file_location('failpoints', {str(Path(__file__).resolve())!r})\n"
        "module = sys.modules['failpoints'] = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        f"module.install(module.parse(os.environ.get({POINTS_VARIABLE!r}, '')))\n"
    )
    before = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([str(folder), *([before] if before else [])])
    return {**os.environ, "PYTHONPATH": path, POINTS_VARIABLE: points, FOLDER_VARIABLE: str(folder)}


def hit_s(folder: Path, point: str) -> float | None:
    """When the point failed, on the monotonic clock (one for all processes); None while it has not."""
    path = folder / f"{point}.hit"
    text = path.read_text() if path.exists() else ""
    return float(text) if text else None
