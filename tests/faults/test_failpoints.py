from __future__ import annotations

import importlib
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.faults.failpoints import POINTS, environment, hit_s, parse

PROGRAM = """
import pathlib, sys
from edge_dkm.outbox import Outbox
outbox = Outbox(pathlib.Path(sys.argv[1]), "st1", lambda camera: camera)
for n in range(1, 6):
    try:
        outbox.unsent(0, 10)
        print(n, "done")
    except (OSError, RuntimeError) as error:
        print(n, type(error).__name__)
"""


def run(folder: Path, points: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", PROGRAM, str(folder / "outbox.db")]
    return subprocess.run(words, capture_output=True, text=True, env=environment(points, folder / "failpoints"))


@pytest.mark.parametrize("point", POINTS)
def test_every_place_is_there(point: str) -> None:
    module, name = POINTS[point]
    place: Any = importlib.import_module(module)
    for part in name.split("."):
        place = getattr(place, part)
    assert callable(place)


def test_the_nth_call_fails_and_no_other(tmp_path: Path) -> None:
    done = run(tmp_path, "outbox.unsent:3:raise")
    assert done.stdout.split("\n")[:5] == ["1 done", "2 done", "3 RuntimeError", "4 done", "5 done"], done.stderr
    assert hit_s(tmp_path / "failpoints", "outbox.unsent") is not None


def test_a_failure_that_stays(tmp_path: Path) -> None:
    assert run(tmp_path, "outbox.unsent:4:enospc+").stdout.split("\n")[2:5] == ["3 done", "4 OSError", "5 OSError"]


def test_a_point_fails_in_one_process_only(tmp_path: Path) -> None:
    assert run(tmp_path, "outbox.unsent:2:kill").returncode == -signal.SIGKILL
    assert run(tmp_path, "outbox.unsent:2:kill").stdout.count("done") == 5


def test_without_points_the_program_is_as_it_was(tmp_path: Path) -> None:
    assert run(tmp_path, "").stdout.count("done") == 5 and hit_s(tmp_path / "failpoints", "outbox.unsent") is None


def test_an_unknown_point_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"failpoint nowhere:1:raise, expected point:n:action"):
        parse("nowhere:1:raise")
