"""A real station is recentred while it runs, rolled back, and killed in between: every result names the codebook that judged it."""

from __future__ import annotations

import contextlib
import io
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_dkm.cli import main
from edge_dkm.codebook import write_codebook
from edge_dkm.codebook_record import CodebookRecord
from edge_dkm.golden import load_golden
from edge_dkm.inspector import Inspector
from edge_dkm.model_file import golden_path
from edge_dkm.recentring.reservoir import read_rows, reservoir_path
from edge_dkm.settings import LineSettings
from tests.broker import Mosquitto, Subscriber
from tests.faults.station import RealStation
from tests.images import draw, write_png
from tests.waiting import wait_until

pytestmark = pytest.mark.broker

Make = Callable[..., LineSettings]
Subscribe = Callable[..., Subscriber]
ENOUGH = 250


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """Sixty good parts, as the tiny model knows them."""
    rng = np.random.default_rng(7)
    for n in range(60):
        write_png(tmp_path / "sixty" / f"{n:03d}.png", draw(("disc", "square", "bars")[n % 3], rng))
    return tmp_path / "sixty"


def line(make_line: Make, port: int, folder: Path) -> LineSettings:
    return make_line(port, cameras=f"{{top: {{source: '{folder}', fps: 200, loop: true, policy: every}}}}")


def edge_dkm(station: RealStation, *words: str) -> tuple[int, Any, str]:
    """Exit code, what `edge-dkm recentre LINE WORDS --json` prints, and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):  # a process of its own is a second of imports
        code = main(["recentre", str(station.line), *words, "--json"])
    return code, json.loads(out.getvalue()) if out.getvalue() else None, err.getvalue()


def kept(settings: LineSettings) -> int:
    with Inspector(settings.model or "") as inspector:
        path = reservoir_path(settings.state, "top", inspector.file.sha256)
        return len(read_rows(path, inspector.file.sha256, inspector.metadata.embed_dim)) if path.exists() else 0


def judged_by(subscriber: Subscriber) -> str:
    return str(subscriber.results()[-1]["model"]["codebook"]) if subscriber.results() else ""


def check_scores(subscriber: Subscriber, settings: LineSettings) -> set[str]:
    """Every result's score is what its codebook says of one of the sixty parts; returns the codebooks."""
    images = [draw(("disc", "square", "bars")[n % 3], rng) for rng in [np.random.default_rng(7)] for n in range(60)]
    record, known = CodebookRecord(settings.state), {}
    results = subscriber.results()
    with Inspector(settings.model or "") as inspector:
        for name in {r["model"]["codebook"] for r in results}:
            inspector.set_codebook(None if name == "base" else inspector.read_codebook(record.file_of(name)))
            known[name] = np.array([inspector.inspect(image).novelty_score for image in images])
    assert all(np.abs(known[r["model"]["codebook"]] - r["novelty"]["score"]).min() < 1e-4 for r in results)
    return set(known)


def test_recentre_switch_kill_restart_and_roll_back(
    mosquitto: Mosquitto, subscribe: Subscribe, make_line: Make, parts: Path, tmp_path: Path
) -> None:
    subscriber, settings = subscribe(mosquitto.port), line(make_line, mosquitto.port, parts)
    with RealStation(settings, tmp_path / "first") as station:
        wait_until(lambda: kept(settings) > ENOUGH)
        code, (dry,), _ = edge_dkm(station, "--dry-run")
        assert code == 0 and dry["codebook"] is None and dry["figures"]["target_frr"] == 0.1
        code, (done,), error = edge_dkm(station)
        assert code == 0 and done["switched"] == "running" and done["running"] == "base", error
        new = done["codebook"]
        wait_until(lambda: judged_by(subscriber) == new)
        wait_until(lambda: subscriber.of("dkm.info/1")[-1]["codebooks"]["top"]["codebook"] == new)
        info = subscriber.of("dkm.info/1")[-1]
        assert info["model"]["codebook"] == new and info["codebooks"]["top"]["parent"] == "base"
        station.process.send_signal(signal.SIGKILL)
        station.process.wait(10)
    with RealStation(settings, tmp_path / "second") as station:
        wait_until(lambda: subscriber.of("dkm.info/1")[-1]["codebooks"]["top"]["since"] is not None)
        before = len(subscriber.results())
        wait_until(lambda: len(subscriber.results()) > before + 20)
        assert judged_by(subscriber) == new
        code, (listed,), _ = edge_dkm(station, "--list")
        assert code == 0 and listed["codebook"] == new and listed["chain"] == ["base"]
        code, (back,), _ = edge_dkm(station, "--rollback")
        assert code == 0 and (back["codebook"], back["switched"]) == ("base", "running")
        wait_until(lambda: judged_by(subscriber) == "base")
        code, _, error = edge_dkm(station, "--rollback", "base")
        assert code == 2 and "base already" in error
        code, _, error = edge_dkm(station, "--rollback", "0" * 12)
        assert code == 3 and "cannot be read" in error
        assert station.stop() == 0
        code, (again,), _ = edge_dkm(station, "--rollback", new)
        assert code == 0 and again["switched"] == "at the next start"
    assert check_scores(subscriber, settings) == {"base", new}


def test_a_codebook_of_another_model_is_refused_at_the_start_and_info_says_so(
    mosquitto: Mosquitto, subscribe: Subscribe, make_line: Make, parts: Path, tmp_path: Path
) -> None:
    subscriber, settings = subscribe(mosquitto.port), line(make_line, mosquitto.port, parts)
    record = CodebookRecord(settings.state)
    with Inspector(settings.model or "") as inspector:
        path = golden_path(Path(settings.model or ""))
        tensors = load_golden(path, inspector.metadata.golden_sha256).codebook
        foreign = write_codebook(record.folder, tensors, {"model_sha256": "e" * 64}).stem
        record.switch("top", inspector.file.sha256, foreign, "recentre")
    with RealStation(settings, tmp_path / "station") as station:
        wait_until(lambda: len(subscriber.results()) > 5)
        assert judged_by(subscriber) == "base" and "S-CODEBOOK camera top" in station.log()
        told = subscriber.of("dkm.info/1")[-1]["codebooks"]["top"]
        assert told["codebook"] == "base" and told["problem"]["code"] == "S-CODEBOOK"
        assert "made for the model eeeeeeeeeeee" in told["problem"]["detail"]


def test_too_many_novel_parts_are_refused_and_the_running_codebook_stays(
    mosquitto: Mosquitto, subscribe: Subscribe, make_line: Make, tmp_path: Path
) -> None:
    rng = np.random.default_rng(8)
    for n in range(40):
        image = draw(("disc", "square", "bars")[n % 3], rng)
        write_png(tmp_path / "bright" / f"{n:03d}.png", np.clip(image * 1.9 + 60, 0, 255).astype(np.uint8))
    subscriber = subscribe(mosquitto.port)
    settings = line(make_line, mosquitto.port, tmp_path / "bright")
    with RealStation(settings, tmp_path / "station") as station:
        wait_until(lambda: kept(settings) > ENOUGH)
        code, (done,), _ = edge_dkm(station)
        assert code == 1 and done["recommended"] == "camera" and done["refusal"]["code"] == "too_many_novel"
        assert done["refusal"]["novel_share"] > 0.3 and done["codebook"] is None
        before = len(subscriber.results())
        wait_until(lambda: len(subscriber.results()) > before + 20)
        assert judged_by(subscriber) == "base" and not (settings.state / "codebooks").exists()
