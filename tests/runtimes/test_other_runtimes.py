"""Each other runtime on few frames; `make runtimes` sets them up, and `python -m tests.runtimes` is the long form."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.runtimes.__main__ import prove
from tests.runtimes.models import export_models
from tests.runtimes.prepare import prepare
from tests.runtimes.report import Line
from tests.runtimes.runtime import ROOT, runtimes

pytestmark = pytest.mark.runtimes
NAMES = ("oldest", "openvino", "web")


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("material")
    prepare(folder, export_models(folder / "made", ("none", "onnx", "pad_l2", "bank")), further=40)
    return folder


@pytest.fixture(scope="module", params=NAMES)
def lines(request: pytest.FixtureRequest, material: Path) -> list[Line]:
    """What one runtime answered."""
    found, not_run = prove(material, [runtimes(ROOT / "build")[request.param]])
    if not_run and request.param in os.environ.get("EDGE_DKM_ALLOW_MISSING", "").split():
        pytest.skip(f"allowed to be missing: {not_run}")
    assert not_run == {}
    return found


def test_it_answers_as_it_should_and_the_controls_are_seen(lines: list[Line]) -> None:
    assert [(line.comparison.case.name, line.comparison.problems) for line in lines if not line.is_right] == []
    assert sum(line.verdict.startswith("seen") for line in lines) == 2


def test_the_ways_to_override_the_codebook_are_those_of_the_docs(lines: list[Line]) -> None:
    ways = {"oldest": "inputs", "openvino": "head outside the graph", "web": "head outside the graph"}
    assert lines[0].about["overrides"] == ways[lines[0].runtime.name]


def test_the_example_of_openvino_runs(material: Path, tmp_path: Path) -> None:
    python = runtimes(ROOT / "build")["openvino"].needs[0]
    if not python.exists() and "openvino" in os.environ.get("EDGE_DKM_ALLOW_MISSING", "").split():
        pytest.skip("allowed to be missing")
    page = (ROOT / "docs/runtimes.md").read_text(encoding="utf-8")
    code = next(block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "openvino" in block)
    shutil.copy(material / "models/none.onnx", tmp_path / "part.onnx")
    done = subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"\d \d+\.\d+ (True|False)\n", done.stdout)
