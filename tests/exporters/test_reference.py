"""An exported model carries what drift is measured against, made of the run's own held-out good images by the line's own measures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from configs import load_text
from edge_dkm import Inspector
from edge_dkm.drift.monitor import DriftMonitor
from edge_dkm.drift.quality import measure
from edge_dkm.drift.reference import KEY, Reference, read_reference
from edge_dkm.drift.statistic import Sighting
from exporters.export import Exported, export_run
from tests.conftest import TINY
from tests.images import KINDS, draw, write_folder
from trainer import FitOptions, fit, load_run
from trainer.settings import TrainSettings


def exported(text: str, folder: Path) -> tuple[Exported, Inspector]:
    run = fit(load_text(TrainSettings, text, "tiny.yaml"), FitOptions(out=folder / "run"))
    done = export_run(run, folder / "part.onnx")
    return done, Inspector(done.path)


def sighting(inspector: Inspector, image: np.ndarray) -> Sighting:
    answer = inspector.inspect(image)
    return Sighting(answer.embedding, answer.cluster.id, answer.novelty_score, measure(image))


def held(inspector: Inspector) -> dict[str, object]:
    found: dict[str, object] = json.loads(inspector.metadata.raw["dkm.reference_hist"])
    return found


def test_the_reference_is_that_of_the_held_out_images(tiny_model_path: Path) -> None:
    with Inspector(tiny_model_path) as inspector:
        text = inspector.metadata.raw["dkm.reference_hist"]
        reference = read_reference(inspector.metadata)
        assert len(text) < 65_536 and {"shares", "novelty_quantiles", KEY} <= set(held(inspector))
        assert (reference.groups, reference.block, reference.missing) == (24, 1, "")  # 40 % of 60 images
        assert reference.frame is not None and reference.rms > 0
        assert {"light", "focus", "novelty", "beyond-1", "direction-0", "cluster-2"} <= set(reference.names)
        ranks = [
            mean for name, mean in zip(reference.names, reference.mean, strict=True) if name in {"light", "novelty"}
        ]
        assert ranks == pytest.approx([0.5, 0.5], abs=0.02)


def test_new_images_of_the_same_kind_lie_inside_and_brighter_ones_do_not(tiny_model_path: Path) -> None:
    rng = np.random.default_rng(11)
    with Inspector(tiny_model_path) as inspector:
        states = []
        for brighter in (0, 90):
            monitor = DriftMonitor(read_reference(inspector.metadata), 3, 1e6, 3000)
            for n in range(250):
                image = np.clip(draw(KINDS[n % 3], rng).astype(np.int64) + brighter, 0, 255).astype(np.uint8)
                monitor.observe(sighting(inspector, image), False)
            states.append(monitor.state())
    assert [state.moved for state in states] == [(), ("light",)]
    assert states[0].recommended == "none" and states[1].recommended == "camera"


def test_images_that_are_gone_leave_shares_and_novelty_and_the_export_says_so(tmp_path: Path) -> None:
    images = write_folder(tmp_path / "images")
    fit(load_text(TrainSettings, TINY.format(path=images), "tiny.yaml"), FitOptions(out=tmp_path / "run"))
    shutil.rmtree(images)
    done = export_run(load_run(tmp_path / "run"), tmp_path / "part.onnx")
    assert "which does not exist" in done.drift
    with Inspector(done.path) as inspector:
        reference = read_reference(inspector.metadata)
        assert KEY not in held(inspector) and "which does not exist" in reference.missing
        assert reference.frame is None and reference.names == (
            "novelty",
            "beyond-1",
            "cluster-0",
            "cluster-1",
            "cluster-2",
        )


@pytest.mark.parametrize(
    ("change", "said"),
    [(("novelty: {target_frr: 0.1}", "novelty: none"), "novelty: none"), (("limit: 60", "limit: 15"), "6 groups")],
)
def test_too_little_that_was_held_out_is_said(change: tuple[str, str], said: str, tmp_path: Path) -> None:
    images = write_folder(tmp_path / "images")
    text = TINY.format(path=f"{images}, limit: 60").replace(*change)
    done, inspector = exported(text, tmp_path)
    with inspector:
        reference = read_reference(inspector.metadata)
        assert said in done.drift and said in reference.missing


def test_parts_of_one_group_count_as_one(tmp_path: Path) -> None:
    images = write_folder(tmp_path / "images", per_kind=40)
    rows = [f"{path.relative_to(images).as_posix()},{n // 4}" for n, path in enumerate(sorted(images.rglob("*.png")))]
    (tmp_path / "groups.csv").write_text("\n".join(["file,group", *rows]))
    _, inspector = exported(TINY.format(path=f"{images}, groups: {tmp_path / 'groups.csv'}"), tmp_path)
    with inspector:
        reference: Reference = read_reference(inspector.metadata)
        assert reference.groups == 12 and 1 <= reference.block <= 4
