"""The real `edge-dkm run` in a process of its own, with failures at named places (see failpoints.py). Tests and measurements start it."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import IO

from configs import load_text
from edge_dkm.settings import LineSettings
from tests.conftest import TINY
from tests.faults.failpoints import environment, hit_s


def build_model(folder: Path) -> Path:
    """A tiny model, trained in seconds; what a line needs and no more."""
    from exporters.export import export_run
    from tests.images import write_folder
    from trainer import FitOptions, fit, load_run
    from trainer.settings import TrainSettings

    images = write_folder(folder / "images")
    fit(load_text(TrainSettings, TINY.format(path=images), "tiny.yaml"), FitOptions(out=folder / "run"))
    export_run(load_run(folder / "run"), folder / "part.onnx")
    return folder / "part.onnx"


def line_settings(model: Path, state: Path, port: int, **sections: str) -> LineSettings:
    """A line with a camera that gives 20 parts per second for ever; keyword arguments replace whole sections."""
    source = model.parent / "images" / "disc"
    values = {
        "station": "st1",
        "model": str(model),
        "cameras": f"{{top: {{source: '{source}', pace: source, fps: 20, loop: true, policy: every}}}}",
        "mqtt": f"{{host: 127.0.0.1, port: {port}, keepalive_s: 5}}",
        "state": str(state),
        **sections,
    }
    return load_text(LineSettings, "\n".join(f"{key}: {value}" for key, value in values.items()), "line.yaml")


class RealStation:
    """A running `edge-dkm run`; its log is `<folder>/station.log`. A context manager: it is killed at the end."""

    def __init__(
        self, settings: LineSettings, folder: Path, failpoints: str = "", *words: str, **variables: str
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.line = folder, folder / "line.yaml"
        self.line.write_text(json.dumps(settings.model_dump(mode="json", exclude_none=True)))
        self._log: IO[bytes] = (folder / "station.log").open("wb")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "edge_dkm", "run", str(self.line), *words],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            env=environment(failpoints, folder / "failpoints") | variables,
        )

    def __enter__(self) -> RealStation:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def log(self) -> str:
        """What it has said so far."""
        return (self.folder / "station.log").read_text(errors="replace")

    def hit_s(self, point: str) -> float | None:
        """When a failpoint was reached."""
        return hit_s(self.folder / "failpoints", point)

    def stop(self, timeout_s: float = 30.0) -> int:
        """SIGTERM; returns the exit code. Raises subprocess.TimeoutExpired where it does not end."""
        self.process.terminate()
        return self.process.wait(timeout_s)

    def close(self) -> None:
        """Kills what still runs."""
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait()
        self._log.close()
