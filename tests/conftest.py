"""Fixtures that several packages' tests share: a tiny trained run and the model exported from it, made once per session."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.images import write_folder

TINY = """
data: {{path: {path}}}
preprocess: {{height_px: 24, width_px: 24}}
encoder: {{name: mlp, hidden: [32], dim: 8}}
pretrain: {{epochs: 3}}
method: {{name: ae_kmeans, n_clusters: 3, n_init: 3}}
novelty: {{target_frr: 0.1}}
train: {{batch_size: 16, device: cpu}}
"""

BANK = "{target_frr: 0.1, bank: {layers: [conv1, conv2], dim: 12, size: 32, max_cost: 10}}"


def with_bank(text: str, novelty: str = BANK) -> str:
    """Settings like TINY's with a convolutional encoder, whose maps a bank looks at."""
    conv = text.replace("{name: mlp, hidden: [32], dim: 8}", "{name: conv, channels: [8, 16, 16], dim: 8}")
    return conv.replace("{target_frr: 0.1}", novelty)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three class folders of 20 images of 32x32."""
    return write_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="session")
def tiny_settings_text(image_folder: Path) -> str:
    """Settings that train in about a second."""
    return TINY.format(path=image_folder)


@pytest.fixture(scope="session")
def tiny_run_folder(tmp_path_factory: pytest.TempPathFactory, tiny_settings_text: str) -> Path:
    """A complete run; do not write into it (`copied_run` is for that)."""
    from configs import load_text
    from trainer import FitOptions, fit
    from trainer.settings import TrainSettings

    folder = tmp_path_factory.mktemp("runs") / "tiny"
    fit(load_text(TrainSettings, tiny_settings_text, "tiny.yaml"), FitOptions(out=folder))
    return folder


@pytest.fixture
def copied_run(tiny_run_folder: Path, tmp_path: Path) -> Path:
    """A copy of the run that a test may damage."""
    return Path(shutil.copytree(tiny_run_folder, tmp_path / "run"))


@pytest.fixture(scope="session")
def tiny_model_path(tmp_path_factory: pytest.TempPathFactory, tiny_run_folder: Path) -> Path:
    """part.onnx with its golden images and digest beside it; do not write into its folder (`copied_model` is for that)."""
    from exporters.export import export_run
    from trainer import load_run

    path = tmp_path_factory.mktemp("model") / "part.onnx"
    export_run(load_run(tiny_run_folder), path)
    return path


@pytest.fixture
def copied_model(tiny_model_path: Path, tmp_path: Path) -> Path:
    """A copy of the model and its sidecars that a test may damage."""
    for path in tiny_model_path.parent.glob("part.onnx*"):
        shutil.copy(path, tmp_path / path.name)
    return tmp_path / "part.onnx"


@pytest.fixture(scope="session")
def bank_run_folder(tmp_path_factory: pytest.TempPathFactory, tiny_settings_text: str) -> Path:
    """A complete run whose novelty looks at patches too; do not write into it."""
    from configs import load_text
    from trainer import FitOptions, fit
    from trainer.settings import TrainSettings

    folder = tmp_path_factory.mktemp("runs") / "bank"
    fit(load_text(TrainSettings, with_bank(tiny_settings_text), "bank.yaml"), FitOptions(out=folder))
    return folder


@pytest.fixture(scope="session")
def bank_model_path(tmp_path_factory: pytest.TempPathFactory, bank_run_folder: Path) -> Path:
    """part.onnx of that run, with what belongs to it; do not write into its folder."""
    from exporters.export import export_run
    from trainer import load_run

    path = tmp_path_factory.mktemp("bank_model") / "part.onnx"
    export_run(load_run(bank_run_folder), path)
    return path
