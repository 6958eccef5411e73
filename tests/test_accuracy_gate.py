"""The regression gate on all 70,000 digits, three seeds: `make gate`. Minutes on a GPU, most of a day on two cores."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from trainer import FitOptions, fit

MNIST = Path(os.environ.get("EDGE_DKM_SHARED", "../shared")) / "data" / "mnist.npz"
FLOORS = {"mnist_ae_kmeans": 0.75, "mnist_dec": 0.80, "mnist_idec": 0.82, "mnist_dkm": 0.80}


@pytest.fixture(scope="module")
def autoencoders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("autoencoders")


@pytest.mark.gate
@pytest.mark.parametrize("config", FLOORS)
def test_the_mean_of_three_seeds_stays_above_its_floor(config: str, autoencoders: Path, tmp_path: Path) -> None:
    if not MNIST.exists():
        pytest.skip(f"{MNIST} is not there")
    found = []
    for seed in range(3):
        overrides = [f"data.path={MNIST}", f"train.seed={seed}", f"pretrain.cache={autoencoders}"]
        found.append(fit(config, FitOptions(tmp_path / str(seed), overrides)).metrics["acc"])
    assert sum(found) / 3 >= FLOORS[config], found
