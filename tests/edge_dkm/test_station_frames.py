"""A whole line whose frames come back: what it keeps of a masked camera, and that the trainer learns from it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from configs import load_text
from edge_dkm.frames.index import read_index
from edge_dkm.settings import LineSettings
from edge_dkm.supervisor import run_line
from tests.broker import Mosquitto, Subscriber
from tests.images import draw, write_png

RNG = np.random.default_rng(0)
pytestmark = pytest.mark.broker


def read(path: Path) -> NDArray[np.uint8]:
    return np.asarray(cv2.imread(str(path)), np.uint8)


def test_no_picture_of_a_masked_camera_shows_what_the_mask_hides(
    mosquitto: Mosquitto,
    subscribe: Callable[..., Subscriber],
    make_line: Callable[..., LineSettings],
    part_folder: Path,
    tmp_path: Path,
) -> None:
    subscribe(mosquitto.port)
    for path in part_folder.glob("*.png"):
        write_png(path, np.maximum(read(path), np.uint8(1)))  # nothing is black by itself
    camera = f"source: '{part_folder}', pace: max, policy: every, roi: [8, 0, 24, 32]"
    mask = "mask: [[[0, 0], [15, 0], [15, 31], [0, 31]]]"
    for station, text in (("masked", f"{camera}, {mask}"), ("control", camera)):
        run_line(
            make_line(
                mosquitto.port,
                cameras=f"{{top: {{{text}, framing: any}}}}",
                frames="{ordinary: 1, per_hour: 1000000}",
                state=str(tmp_path / station),
            )
        )
        pictures = [read(path) for path in (tmp_path / station / "frames/top").glob("*.png")]
        assert len(pictures) == 12 and all(picture[:, 8:].all() for picture in pictures)
        shown = [picture[:, :8].any() for picture in pictures]
        assert not any(shown) if station == "masked" else all(shown)
        row = read_index(tmp_path / station / "frames/top/index.csv")[0]
        assert (row.roi, row.frame) == ("8 0 24 32", "32x32")


def test_a_stations_ring_is_trained_on_as_it_stands(
    mosquitto: Mosquitto,
    subscribe: Callable[..., Subscriber],
    make_line: Callable[..., LineSettings],
    part_folder: Path,
    tmp_path: Path,
) -> None:
    subscribe(mosquitto.port)
    from trainer import FitOptions, fit
    from trainer.settings import TrainSettings

    for n in range(12, 30):
        write_png(part_folder / f"{n:03d}.png", draw(("disc", "square", "bars")[n % 3], RNG))
    run_line(make_line(mosquitto.port, frames="{ordinary: 1, per_hour: 1000000}"))
    text = f"""
data: {{path: {tmp_path / "state/frames/top"}}}
preprocess: {{height_px: 24, width_px: 24}}
encoder: {{name: mlp, hidden: [16], dim: 4}}
pretrain: {{epochs: 1}}
method: {{name: ae_kmeans, n_clusters: 2, n_init: 1}}
novelty: {{target_frr: 0.2}}
train: {{batch_size: 8, device: cpu}}
"""
    run = fit(load_text(TrainSettings, text, "ring.yaml"), FitOptions(out=tmp_path / "run"))
    assert run.info["train"]["n"] == 30 and run.info["novelty"]["groups"] == 9  # 30 % of 30 parts, a group each
    assert read_index(tmp_path / "state/frames/top/index.csv")[0].cluster
