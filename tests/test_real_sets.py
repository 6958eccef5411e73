"""Real images and a real film reach the figures that they are known for. Minutes; skipped where the sets are not there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.line import conveyor
from benchmarks.novelty import bottle
from benchmarks.table import REAL_SETS, WEIGHTS
from edge_dkm.inspector import Inspector
from exporters.export import export_run
from trainer import FitOptions, Run, fit
from trainer.data import load_dataset
from trainer.images import open_images

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not REAL_SETS.exists(), reason=f"the real image sets are not there ({REAL_SETS})"),
]


def x_sdd(name: str, folder: Path) -> Run:
    """A run of one of the shipped x_sdd settings, seed 0."""
    return fit(name, FitOptions(folder, [f"data.path={REAL_SETS / 'x_sdd'}", WEIGHTS]))


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return x_sdd("x_sdd_ae_kmeans", tmp_path_factory.mktemp("x_sdd") / "control")


def test_the_control_finds_the_classes_of_steel_strip(control: Run) -> None:
    assert control.metrics["acc"] >= 0.74 and control.metrics["nmi"] >= 0.72


def test_dec_moves_assignments_and_beats_its_control(control: Run, tmp_path: Path) -> None:
    from benchmarks.accuracy.x_sdd import assignments
    from trainer.metric import score_labels

    run = x_sdd("x_sdd_dec", tmp_path / "dec")
    assert 1 - score_labels(assignments(control), assignments(run)).acc >= 0.02
    assert run.metrics["acc"] > control.metrics["acc"]


def test_the_exported_file_gives_the_ids_of_predict_on_real_images(control: Run, tmp_path: Path) -> None:
    export_run(control, tmp_path / "part.onnx")
    settings = control.settings
    source = settings.data.model_copy(update={"limit": 100})
    pixels = load_dataset(open_images(source), source, settings.preprocess, iter)[0].pixels.numpy()
    pixels = np.repeat(pixels, 3, -1) if pixels.shape[-1] == 1 else pixels  # as a camera gives grey
    with Inspector(tmp_path / "part.onnx") as inspector:
        ids = [inspector.inspect(image).cluster.id for image in pixels]
    assert np.array_equal(ids, control.model.predict(pixels))


def test_defective_bottles_are_found_and_the_false_reject_rate_holds() -> None:
    result, calibration, _ = bottle.measure((), seed=0)
    good, total = result.flagged.pop("good")
    low, high = bottle.false_reject_interval(calibration, total, 0.05)
    flagged, defects = (sum(column) for column in zip(*result.flagged.values(), strict=True))
    assert result.auroc is not None and result.auroc >= 0.985
    assert low <= good <= high and flagged >= 0.85 * defects


@pytest.mark.broker
def test_a_real_belt_gives_one_result_per_part_and_the_cone_stands_out(tmp_path: Path) -> None:
    line = conveyor.measure(tmp_path)
    assert len(line.results) == conveyor.PARTS and line.is_gapless
    assert min(line.scores[conveyor.SWITCHES :]) > max(line.scores[: conveyor.SWITCHES])
