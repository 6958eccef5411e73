"""Pytest plugin for an environment without the training stack: `-p tests.runtimes.exported_model --noconftest`.

Gives the edge's tests the fixtures of tests/conftest.py from models that were exported elsewhere, named by EDGE_DKM_EXPORTED and, of the one
with a bank, EDGE_DKM_EXPORTED_BANK.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """part.onnx with its golden images and digest beside it."""
    return _copied(Path(os.environ["EDGE_DKM_EXPORTED"]), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def bank_model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of a model that looks at patches too."""
    return _copied(Path(os.environ["EDGE_DKM_EXPORTED_BANK"]), tmp_path_factory.mktemp("bank_model"))


def _copied(exported: Path, folder: Path) -> Path:
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
