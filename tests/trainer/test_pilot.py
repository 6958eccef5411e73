from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from configs import load_settings
from tests.images import draw, write_folder, write_png
from trainer import FitOptions, fit
from trainer.cli import main
from trainer.pilot import PilotOptions, pilot
from trainer.settings import TrainSettings


def test_the_settings_it_writes_are_fitted_as_they_are(image_folder: Path, tmp_path: Path) -> None:
    result = pilot(str(image_folder), PilotOptions(k=3, max_images=30, out=tmp_path / "pilot"))
    settings = load_settings(TrainSettings, result.recommended, "train")
    assert settings == result.settings and settings.data.limit is None and settings.pretrain.cache is None
    assert result.comparison is not None and result.used == 30 and settings.calibration is not None
    assert any("labels were not used" in line for line in result.advice)
    assert any(
        "a false-reject rate of 1.0% needs about 330 independent parts; there are 60: fewer" in line
        for line in result.advice
    )
    overrides = ["pretrain.epochs=1", *(["method.epochs=1"] if settings.method.name != "ae_kmeans" else [])]
    run = fit(result.recommended, FitOptions(tmp_path / "run", overrides))
    assert len(run.clusters) == 3 and run.info["train"]["n"] == 60


def test_images_of_one_kind_are_said_to_be_one_group(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "pilot"
    rng = np.random.default_rng(0)
    for n in range(60):
        write_png(tmp_path / "one" / f"{n:03d}.png", draw("bars", rng))
    assert main(["pilot", str(tmp_path / "one"), "--out", str(out), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["n_clusters"] == 1 and result["sweep"] is None
    assert "clustering does not help here" in result["advice"][0]
    assert load_settings(TrainSettings, out / "recommended.yaml", "train").method.n_clusters == 1


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--k", "0"], "expected at least 20 images and 1 cluster"),
        (["--max-images", "5"], "expected at least 20 images and 1 cluster"),
        (["--max-images", "30"], "has 30 usable images, expected at least 40 to look for the number of clusters"),
    ],
)
def test_each_mistake_is_one_line(
    image_folder: Path, tmp_path: Path, more: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pilot", str(image_folder), "--out", str(tmp_path / "p"), *more]) == 2
    assert text in capsys.readouterr().err


def test_images_too_small_for_pretrained_features_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:

    folder = write_folder(tmp_path / "small", per_kind=7, side_px=16)
    assert (
        main(["pilot", str(folder), "--weights", "w.safetensors", "--out", str(tmp_path / "p"), "--max-images", "20"])
        == 2
    )
    assert "are 16x16, which leaves 16x16 for --weights w.safetensors, expected at least 32" in capsys.readouterr().err
