from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file
from safetensors.torch import save_file

from configs import ConfigError, load_text
from tests.trainer.learning import warped_blobs, write_blobs
from tests.trainer.test_checkpoint import Listening
from trainer import FitOptions, Run, fit
from trainer.autoencoder import NAME
from trainer.encoders.pretrained import SqueezeNet
from trainer.errors import ArtifactError, DataError
from trainer.settings import TrainSettings

TEXT = """
data: {{path: {path}}}
preprocess: {{resize: none, color: gray}}
encoder: {{name: mlp, hidden: [16], dim: 6}}
pretrain: {{epochs: 3}}
method: {{name: ae_kmeans, n_clusters: 5, n_init: 3}}
novelty: none
train: {{batch_size: 32, device: cpu}}
"""


@pytest.fixture(scope="module")
def blobs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_blobs(tmp_path_factory.mktemp("blobs") / "blobs.npz", per_kind=20)


def settings(blobs: Path, **changes: Any) -> TrainSettings:
    document = yaml.safe_load(TEXT.format(path=blobs))
    for key, value in changes.items():
        document[key] = {**document[key], **value}
    return load_text(TrainSettings, yaml.safe_dump(document), "blobs.yaml")


def fitted(blobs: Path, out: Path, **changes: Any) -> Run:
    return fit(settings(blobs, **changes), FitOptions(out=out))


def stages(run: Run) -> list[str]:
    assert run.path is not None
    return [json.loads(line)["stage"] for line in (run.path / "metrics.jsonl").read_text().splitlines()]


def equal(a: Path, b: Path, names: Sequence[str] = ("encoder.safetensors", "codebook.safetensors")) -> bool:
    return all(
        np.array_equal(x, y)
        for name in names
        for x, y in zip(load_file(a / name).values(), load_file(b / name).values(), strict=True)
    )


def test_a_run_leaves_its_autoencoder_and_another_starts_from_it(blobs: Path, tmp_path: Path) -> None:
    first = fitted(blobs, tmp_path / "first")
    second = fitted(blobs, tmp_path / "second", pretrain={"from": str(tmp_path / "first")})
    assert stages(first).count("reconstruct") == 3 and "reconstruct" not in stages(second)
    assert equal(tmp_path / "first", tmp_path / "second")
    assert (tmp_path / "second" / NAME).is_file()  # so that a third may start from it


def test_a_dec_run_from_an_autoencoder_equals_one_that_pretrains_itself(blobs: Path, tmp_path: Path) -> None:
    dec = {"name": "dec", "epochs": 2}
    fitted(blobs, tmp_path / "ae")
    fitted(blobs, tmp_path / "alone", method=dec)
    fitted(blobs, tmp_path / "shared", method=dec, pretrain={"from": str(tmp_path / "ae")})
    assert equal(tmp_path / "alone", tmp_path / "shared")
    assert not equal(tmp_path / "alone", tmp_path / "ae")  # negative control: dec does change it


def test_a_cache_pretrains_once_per_seed_and_recipe(blobs: Path, tmp_path: Path) -> None:
    cache = {"cache": str(tmp_path / "cache")}
    runs = [
        fitted(blobs, tmp_path / "a", pretrain=cache),
        fitted(blobs, tmp_path / "b", pretrain=cache, method={"name": "dec", "epochs": 1}),
        fitted(blobs, tmp_path / "c", pretrain=cache, train={"seed": 1}),
        fitted(blobs, tmp_path / "d", pretrain={**cache, "epochs": 2}),
    ]
    assert [stages(run).count("reconstruct") for run in runs] == [3, 0, 3, 2]
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_an_autoencoder_of_other_images_or_another_encoder_is_refused(blobs: Path, tmp_path: Path) -> None:
    fitted(blobs, tmp_path / "first")
    other = write_blobs(tmp_path / "other.npz", per_kind=20, seed=1)
    taken = {"from": str(tmp_path / "first")}
    with pytest.raises(DataError, match="learned with other images"):
        fitted(other, tmp_path / "x", pretrain=taken)
    with pytest.raises(DataError, match=r"learned with other encoder .*expected the same"):
        fitted(blobs, tmp_path / "y", pretrain=taken, encoder={"dim": 7})
    with pytest.raises(DataError, match="learned with other preprocess"):
        fitted(blobs, tmp_path / "z", pretrain=taken, preprocess={"normalise": "unit"})


def test_another_runs_autoencoder_never_goes_into_the_cache(blobs: Path, tmp_path: Path) -> None:
    cache = {"cache": str(tmp_path / "cache")}
    fitted(blobs, tmp_path / "src", train={"seed": 7})
    taken = fitted(blobs, tmp_path / "taken", pretrain={**cache, "from": str(tmp_path / "src")})
    own = fitted(blobs, tmp_path / "own", pretrain=cache)
    assert [stages(run).count("reconstruct") for run in (taken, own)] == [0, 3]
    assert (tmp_path / "taken" / NAME).read_bytes() == (tmp_path / "src" / NAME).read_bytes()  # its header too


def test_an_autoencoder_that_saw_calibration_parts_is_refused_where_novelty_is_promised(
    blobs: Path, tmp_path: Path
) -> None:
    promise = "novelty: {target_frr: 0.1}"
    text = TEXT.format(path=blobs).replace("novelty: none", promise)
    first = load_text(TrainSettings, text, "first.yaml")
    fit(first, FitOptions(out=tmp_path / "first"))
    taken = text.replace("{epochs: 3}", f"{{epochs: 3, from: {tmp_path / 'first'}}}")
    fit(load_text(TrainSettings, taken, "same.yaml"), FitOptions(out=tmp_path / "same"))
    other = load_text(TrainSettings, taken.replace("device: cpu", "device: cpu, seed: 1"), "other.yaml")
    with pytest.raises(DataError, match="would void its promise"):
        fit(other, FitOptions(out=tmp_path / "other"))


def test_what_is_not_there_or_damaged_is_named(blobs: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"none/autoencoder\.safetensors does not exist"):
        fitted(blobs, tmp_path / "x", pretrain={"from": str(tmp_path / "none")})
    fitted(blobs, tmp_path / "first")
    path = tmp_path / "first" / NAME
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ArtifactError, match="cannot be read"):
        fitted(blobs, tmp_path / "y", pretrain={"from": str(tmp_path / "first")})


def test_the_yaml_key_is_from_and_makes_no_sense_without_pretraining(blobs: Path) -> None:
    text = TEXT.format(path=blobs)
    loaded = load_text(TrainSettings, text.replace("{epochs: 3}", "{epochs: 3, from: runs/a}"), "a.yaml")
    assert loaded.pretrain.from_run == "runs/a" and loaded.plain()["pretrain"]["from"] == "runs/a"
    with pytest.raises(ConfigError, match="from is runs/a with kind none"):
        load_text(TrainSettings, text.replace("{epochs: 3}", "{kind: none, from: runs/a}"), "a.yaml")
    with pytest.raises(ConfigError, match="did you mean 'from'"):
        load_text(TrainSettings, text.replace("{epochs: 3}", "{epochs: 3, fro: runs/a}"), "a.yaml")


def test_a_frozen_encoder_has_none_to_take_and_says_so(tmp_path: Path) -> None:
    np.savez(tmp_path / "set.npz", X=warped_blobs(per_kind=4)[0])
    save_file(SqueezeNet(1, ("fire9",)).state_dict(), tmp_path / "weights.safetensors")
    document = yaml.safe_load(TEXT.format(path=tmp_path / "set.npz"))
    document["encoder"] = {"name": "pretrained", "weights": str(tmp_path / "weights.safetensors"), "layers": ["fire2"]}
    document["preprocess"] = {"height_px": 32, "width_px": 32, "color": "gray"}
    for source, text in (
        (None, ""),
        (str(tmp_path / "other"), "pretrain.from is .*other, but encoder pretrained is frozen"),
    ):
        document["pretrain"] = {} if source is None else {"from": source}
        wanted = load_text(TrainSettings, yaml.safe_dump(document), "frozen.yaml")
        with pytest.raises(DataError, match=text) if source else nullcontext():
            fit(wanted, FitOptions(out=tmp_path / "run"))
        shutil.rmtree(tmp_path / "run")


def test_an_autoencoder_that_cannot_be_written_does_not_cost_the_run(blobs: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").touch()  # a file, where a folder is needed
    progress = Listening()
    options = FitOptions(out=tmp_path / "run", progress=progress)
    run = fit(settings(blobs, pretrain={"cache": str(tmp_path / "cache")}), options)
    assert run.path == tmp_path / "run" and (tmp_path / "run" / NAME).is_file()
    assert [line for line in progress.said if "cannot be written" in line and str(tmp_path / "cache") in line]
