"""Every method on the same warped blobs, from the same autoencoders: none may fall behind the control, none may lose a cluster."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs import load_text
from tests.trainer.learning import write_blobs
from trainer import FitOptions, Run, fit
from trainer.settings import TrainSettings

SEEDS = range(5)
TEXT = """
data: {{path: {path}}}
preprocess: {{resize: none, color: gray}}
encoder: {{name: mlp, hidden: [32], dim: 10}}
pretrain: {{epochs: 30, cache: {cache}}}
method: {method}
novelty: none
train: {{batch_size: 64, device: cpu, seed: {seed}}}
"""
METHODS = {
    "dec": "{name: dec, n_clusters: 5, epochs: 10}",
    "idec": "{name: idec, n_clusters: 5, epochs: 10}",
    "dcn": "{name: dcn, n_clusters: 5, epochs: 10, kmeans_every_epochs: 5}",
    "dkm": "{name: dkm, n_clusters: 5, rounds: 4, epochs_per_alpha: 2}",
    "centering": "{name: centering, n_clusters: 5, epochs: 10}",
    "dekm": "{name: dekm, n_clusters: 5, epochs: 5, refresh_steps: 5}",
    "smoothed_kmeans": "{name: smoothed_kmeans, n_clusters: 5}",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("blobs")
    write_blobs(made / "blobs.npz", per_kind=60)
    return made


def fitted(folder: Path, method: str, seed: int) -> Run:
    out = folder / f"{abs(hash(method))}-{seed}"
    text = TEXT.format(path=folder / "blobs.npz", cache=folder / "cache", method=method, seed=seed)
    if "annealed" in method:
        text = text.replace("pretrain: {epochs: 30, ", "pretrain: {kind: none, ")  # its own way of starting
    return fit(load_text(TrainSettings, text, "blobs.yaml"), FitOptions(out=out))


@pytest.fixture(scope="module")
def control(folder: Path) -> list[float]:
    return [fitted(folder, "{name: ae_kmeans, n_clusters: 5}", seed).metrics["acc"] for seed in SEEDS]


@pytest.mark.parametrize("name", METHODS)
def test_no_method_falls_behind_the_control_or_loses_a_cluster(folder: Path, control: list[float], name: str) -> None:
    runs = [fitted(folder, METHODS[name], seed) for seed in SEEDS]
    assert all(row["n"] > 0 for run in runs for row in run.clusters)
    assert sum(run.metrics["acc"] for run in runs) / 5 >= sum(control) / 5 - 0.01


@pytest.mark.slow
def test_annealing_from_scratch_finds_nearly_all_and_loses_no_cluster(folder: Path) -> None:
    method = "{name: dkm, n_clusters: 5, alpha: annealed, init: uniform, epochs_per_alpha: 1, optimizer: {kind: adam, lr: 0.003}}"
    runs = [fitted(folder, method, seed) for seed in SEEDS]
    assert all(row["n"] > 0 for run in runs for row in run.clusters)
    assert sum(run.metrics["acc"] for run in runs) / 5 >= 0.9  # five kinds: .2 by chance
