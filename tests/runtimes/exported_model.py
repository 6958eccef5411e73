"""Pytest plugin for an environment without the training stack: `-p tests.runtimes.exported_model --noconftest`.

Gives the edge's tests the fixtures of tests/conftest.py from a model that was exported elsewhere, named by EDGE_DKM_EXPORTED.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """part.onnx with its golden images and digest beside it."""
    exported, folder = Path(os.environ["EDGE_DKM_EXPORTED"]), tmp_path_factory.mktemp("model")
    for path in exported.parent.glob(f"{exported.name}*"):
        shutil.copy(path, folder / path.name.replace(exported.name, "part.onnx"))
    digest = folder / "part.onnx.sha256"
    digest.write_text(digest.read_text(encoding="ascii").replace(exported.name, "part.onnx"), encoding="ascii")
    return folder / "part.onnx"


@pytest.fixture
def copied_model(tiny_model_path: Path, tmp_path: Path) -> Path:
    """A copy of the model and its sidecars that a test may damage."""
    for path in tiny_model_path.parent.glob("part.onnx*"):
        shutil.copy(path, tmp_path / path.name)
    return tmp_path / "part.onnx"
