from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs import load_text
from tests.images import draw, write_png
from trainer import FitOptions, Run, fit, load_run
from trainer.checkpoint import NAME
from trainer.errors import ArtifactError, CollapseError, DataError
from trainer.loop import InterruptedTraining
from trainer.progress import Silent
from trainer.settings import TrainSettings

DEC = """
data: {{path: {path}}}
preprocess: {{height_px: 24, width_px: 24}}
encoder: {{name: mlp, hidden: [32], dim: 8}}
pretrain: {{epochs: 3}}
method: {{name: dec, n_clusters: 3, n_init: 3, epochs: 3, tol: 0, refresh_steps: 1, optimizer: {{kind: adam, lr: 0.001}}}}
novelty: none
train: {{batch_size: 16, device: cpu, checkpoint_every_s: 0}}
"""


DEC_METHOD = (
    "{name: dec, n_clusters: 3, n_init: 3, epochs: 3, tol: 0, refresh_steps: 1, optimizer: {kind: adam, lr: 0.001}}"
)


def dec(path: Path, **changes: Any) -> TrainSettings:
    settings = load_text(TrainSettings, DEC.format(path=path), "dec.yaml")
    return settings.model_copy(update=changes)


def tensors(run: Run) -> list[np.ndarray]:
    return [value.numpy() for value in run.model.state_dict().values()]


class StopAfter(Silent):
    """Presses Ctrl-C at the end of the given epoch of a stage, as a person would: by the signal."""

    def __init__(self, stage: str, epoch: int) -> None:
        self._stage, self._epoch, self._now = stage, epoch, ""

    def stage(self, name: str, epochs: int, first: int) -> None:
        self._now = name

    def epoch(self, epoch: int, figures: dict[str, float]) -> None:
        if (self._now, epoch) == (self._stage, self._epoch):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(("stage", "epoch"), [("reconstruct", 1), ("dec", 0), ("dec", 1)])
def test_a_resumed_run_ends_as_an_uninterrupted_one(image_folder: Path, tmp_path: Path, stage: str, epoch: int) -> None:
    whole = fit(dec(image_folder), FitOptions(out=tmp_path / "whole"))
    with pytest.raises(InterruptedTraining, match=f"stage {stage}"):
        fit(dec(image_folder), FitOptions(out=tmp_path / "cut", progress=StopAfter(stage, epoch)))
    assert (tmp_path / "cut" / "checkpoints" / NAME).is_file() and not (tmp_path / "cut" / "model.json").exists()
    resumed = fit(dec(image_folder), FitOptions(out=tmp_path / "cut", resume=True))
    assert all(np.array_equal(a, b) for a, b in zip(tensors(whole), tensors(resumed), strict=True))
    epochs = [
        [
            (row["stage"], row.get("epoch"))
            for row in map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        ]
        for name in ("whole", "cut")
    ]
    assert epochs[0] == epochs[1]


def test_an_interrupted_run_is_not_overwritten_by_accident(image_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InterruptedTraining):
        fit(dec(image_folder), FitOptions(out=tmp_path, progress=StopAfter("reconstruct", 1)))
    with pytest.raises(DataError, match="--resume continues it"):
        fit(dec(image_folder), FitOptions(out=tmp_path))
    with pytest.raises(ArtifactError, match="other settings"):
        fit(
            dec(image_folder, train=dec(image_folder).train.model_copy(update={"seed": 9})),
            FitOptions(out=tmp_path, resume=True),
        )
    with pytest.raises(ArtifactError, match=r"unfinished run; .* --resume"):
        load_run(tmp_path)


def test_a_resume_on_changed_images_is_refused(image_folder: Path, tmp_path: Path) -> None:
    import shutil

    images = Path(shutil.copytree(image_folder, tmp_path / "images"))
    with pytest.raises(InterruptedTraining):
        fit(dec(images), FitOptions(out=tmp_path / "run", progress=StopAfter("reconstruct", 1)))
    write_png(images / "disc" / "000.png", draw("disc", np.random.default_rng(99)))
    with pytest.raises(
        ArtifactError, match=r"other images \(manifest [0-9a-f]{12}, now [0-9a-f]{12}\); restore the data"
    ):
        fit(dec(images), FitOptions(out=tmp_path / "run", resume=True))


def test_a_complete_run_is_never_overwritten(tiny_run_folder: Path, image_folder: Path) -> None:
    with pytest.raises(DataError, match="already holds a complete run"):
        fit(dec(image_folder), FitOptions(out=tiny_run_folder))


def test_fitting_works_outside_the_main_thread(image_folder: Path, tmp_path: Path) -> None:
    result: list[Run] = []
    thread = threading.Thread(target=lambda: result.append(fit(dec(image_folder), FitOptions(out=tmp_path))))
    thread.start()
    thread.join()
    assert result and (tmp_path / "model.json").is_file()


def test_the_run_folder_holds_what_the_contract_lists(tiny_run_folder: Path) -> None:
    names = {path.name for path in tiny_run_folder.iterdir()}
    assert names >= {
        "config.yaml",
        "encoder.safetensors",
        "model.json",
        "codebook.safetensors",
        "metrics.jsonl",
        "checkpoints",
        "report.html",
        "labels.yaml",
        "assignments.csv",
        "golden",
    }
    info = json.loads((tiny_run_folder / "model.json").read_text())
    assert info["schema"] == "dkm.run/1" and len(info["train"]["manifest_sha256"]) == 64
    assert set(info["clusters"][0]) == {"id", "name", "n", "radius", "q50", "q99"}
    stages = [json.loads(line)["stage"] for line in (tiny_run_folder / "metrics.jsonl").read_text().splitlines()]
    assert stages == ["reconstruct"] * 3 + ["result"]
    assert not (tiny_run_folder / "checkpoints" / NAME).exists()


def test_the_resolved_settings_repeat_the_run(tiny_run_folder: Path, tmp_path: Path) -> None:
    again = fit(tiny_run_folder / "config.yaml", FitOptions(out=tmp_path / "again"))
    first = load_run(tiny_run_folder)
    assert all(np.array_equal(a, b) for a, b in zip(tensors(first), tensors(again), strict=True))


def test_a_loaded_run_predicts_and_transforms_like_the_fitted_one(image_folder: Path, tmp_path: Path) -> None:
    run = fit(dec(image_folder), FitOptions(out=tmp_path))
    images = [draw(kind, np.random.default_rng(5)) for kind in ("disc", "square", "bars")]
    again = load_run(tmp_path)
    assert np.array_equal(run.model.transform(images), again.model.transform(images))
    assert again.model.predict(images).tolist() == run.model.predict(images).tolist()
    assert again.model.predict([]).shape == (0,)
    with pytest.raises(ValueError, match="float64"):
        again.model.predict([np.zeros((8, 8, 3))])  # type: ignore[list-item]


def test_dec_moves_encoder_and_centroids_away_from_the_control(image_folder: Path, tmp_path: Path) -> None:
    text = DEC.format(path=image_folder)
    control = fit(
        load_text(TrainSettings, text.replace(DEC_METHOD, "{name: ae_kmeans, n_clusters: 3, n_init: 3}"), "a.yaml"),
        FitOptions(out=tmp_path / "control"),
    )
    trained = fit(dec(image_folder), FitOptions(out=tmp_path / "dec"))
    assert float((control.model.centroids - trained.model.centroids).detach().abs().max()) > 1e-4
    before, after = (run.model.encoder.layers[0].weight for run in (control, trained))  # type: ignore[index, union-attr]
    assert float((before - after).detach().abs().max()) > 1e-4


def test_dec_stops_when_hardly_any_label_changes(image_folder: Path, tmp_path: Path) -> None:
    settings = dec(image_folder)
    method = settings.method.model_copy(update={"epochs": 50, "tol": 0.05})
    fit(settings.model_copy(update={"method": method}), FitOptions(out=tmp_path))
    epochs = [
        row for row in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines()) if row["stage"] == "dec"
    ]
    assert 3 <= len(epochs) < 50 and epochs[-1]["churn"] < 0.05


def test_layerwise_pretraining_runs_one_stage_per_layer_and_lowers_the_error(
    image_folder: Path, tmp_path: Path
) -> None:
    settings = dec(image_folder)
    pretrain = settings.pretrain.model_copy(update={"kind": "layerwise", "layer_epochs": 8, "epochs": 20})
    fit(settings.model_copy(update={"pretrain": pretrain}), FitOptions(out=tmp_path))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = {
        stage: [row["loss"] for row in rows if row["stage"] == stage] for stage in ("layer1", "layer2", "reconstruct")
    }
    assert all(series[-1] < series[0] for series in losses.values())


def test_a_constant_image_set_names_the_setting(tmp_path: Path) -> None:
    for n in range(6):
        write_png(tmp_path / "images" / f"{n}.png", np.full((32, 32, 3), 90, np.uint8))
    with pytest.raises(DataError, match=r"method\.n_clusters is 3, but the 6 images have only 1"):
        fit(dec(tmp_path / "images"), FitOptions(out=tmp_path / "run"))


def test_fewer_images_than_clusters_names_both(tmp_path: Path) -> None:
    for n in range(2):
        write_png(tmp_path / "images" / f"{n}.png", draw("disc", np.random.default_rng(n)))
    with pytest.raises(DataError, match="n_clusters is 3, but there are 2 training images"):
        fit(dec(tmp_path / "images"), FitOptions(out=tmp_path / "run"))


def test_one_image_and_one_cluster_train(tmp_path: Path) -> None:
    write_png(tmp_path / "images" / "only.png", draw("disc", np.random.default_rng(0)))
    text = DEC.format(path=tmp_path / "images").replace(DEC_METHOD, "{name: ae_kmeans, n_clusters: 1}")
    run = fit(load_text(TrainSettings, text, "one.yaml"), FitOptions(out=tmp_path / "run"))
    assert run.model.predict([draw("disc", np.random.default_rng(1))]).tolist() == [0]


def test_a_diverging_loss_stops_with_the_guards_name_and_keeps_the_last_good_checkpoint(
    image_folder: Path, tmp_path: Path
) -> None:
    settings = dec(image_folder)
    optimizer = settings.pretrain.optimizer.model_copy(update={"kind": "sgd", "lr": 1e12})
    broken = settings.model_copy(
        update={"method": settings.method.model_copy(update={"optimizer": optimizer, "epochs": 5})}
    )
    with pytest.raises(CollapseError, match="guard"):
        fit(broken, FitOptions(out=tmp_path))
    from safetensors.torch import load_file

    kept = load_file(tmp_path / "checkpoints" / NAME)
    assert all(torch.isfinite(value).all() for value in kept.values() if value.is_floating_point())
    with pytest.raises(ArtifactError, match=r"a run whose training collapsed \(guard .*change the settings"):
        load_run(tmp_path)  # as the exporter does


def test_cuda_that_is_not_there_is_an_error_and_not_a_slow_run(image_folder: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    settings = dec(image_folder)
    with pytest.raises(DataError, match=r"train\.device is cuda, but"):
        fit(
            settings.model_copy(update={"train": settings.train.model_copy(update={"device": "cuda"})}),
            FitOptions(out=tmp_path),
        )


def test_skipped_images_are_said_while_training(image_folder: Path, tmp_path: Path) -> None:
    import shutil

    images = Path(shutil.copytree(image_folder, tmp_path / "images"))
    (images / "disc" / "broken.png").write_text("no image")

    class Listening(Silent):
        said: list[str] = []

        def say(self, text: str) -> None:
            self.said.append(text)

        def read(self, items: Sequence[Any]) -> Iterator[Any]:
            return iter(items)

    run = fit(dec(images), FitOptions(out=tmp_path / "run", progress=Listening()))
    assert any("skipped disc/broken.png: is no image" in line for line in Listening.said)
    assert run.info["train"]["skipped"] == 1
