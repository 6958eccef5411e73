from __future__ import annotations

from pathlib import Path

import pytest

from configs import load_text
from exporters.graph import FusedModel
from tests.conftest import TINY
from trainer import FitOptions, fit
from trainer.settings import TrainSettings


@pytest.fixture(scope="session")
def tiny_conv_run(tmp_path_factory: pytest.TempPathFactory, image_folder: Path) -> Path:
    """A run with a convolutional encoder, which int8 is for; do not write into it."""
    folder = tmp_path_factory.mktemp("runs") / "conv"
    text = TINY.format(path=image_folder).replace(
        "{name: mlp, hidden: [32], dim: 8}", "{name: conv, channels: [8, 16, 16], dim: 8}"
    )
    fit(load_text(TrainSettings, text, "conv.yaml"), FitOptions(out=folder))
    return folder


@pytest.fixture
def tiny_conv_fused(tiny_conv_run: Path) -> FusedModel:
    from trainer import load_run

    return FusedModel(load_run(tiny_conv_run).model.eval())
