"""A bank in a run: learned, calibrated with, saved, used; and what is refused."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from configs import load_text
from tests.conftest import with_bank
from tests.images import KINDS, draw
from trainer import FitOptions, Run, fit, load_run
from trainer.bank import learning
from trainer.bank.fitting import set_radius
from trainer.bank.learning import Material, learn_bank, sample_cells
from trainer.bank.settings import BankSettings
from trainer.encoders.conv import ConvEncoder, ConvSettings
from trainer.errors import DataError
from trainer.evaluate import evaluate, predict
from trainer.model import ClusterModel
from trainer.novelty import novelty_distance
from trainer.preprocess import Preprocess, PreprocessSettings
from trainer.projection import Projection, ProjectionSettings
from trainer.settings import TrainSettings

SETTINGS = BankSettings(layers=("conv1", "conv2"), dim=12, size=32, max_cost=10)


def fitted(text: str, out: Path, bank: str) -> Run:
    settings = load_text(TrainSettings, with_bank(text, f"{{target_frr: 0.1, bank: {bank}}}"), "bank.yaml")
    return fit(settings, FitOptions(out=out))


@pytest.fixture(scope="module")
def run(bank_run_folder: Path) -> Run:
    return load_run(bank_run_folder)


@pytest.fixture
def model(bank_run_folder: Path) -> ClusterModel:
    return load_run(bank_run_folder).model


def pixels(model: ClusterModel, per_kind: int = 6, seed: int = 3) -> Tensor:
    """Parts that no run has seen."""
    rng = np.random.default_rng(seed)
    images = np.stack([draw(kind, rng) for kind in KINDS for _ in range(per_kind)])
    return model.preprocess.geometry(torch.from_numpy(images))


def scratched(images: Tensor) -> Tensor:
    """Each with a bright spot of 3x3 pixels, in a corner."""
    damaged = images.clone()
    damaged[:, 2:5, 2:5] = torch.tensor([255, 0, 255], dtype=torch.uint8)
    return damaged


def material(model: ClusterModel, images: Tensor) -> Material:
    ids, _ = model.assign(model.embed_dataset(images))
    return Material(images, np.arange(len(images)), ids, seed=0)


def test_the_raw_score_is_the_higher_of_both(model: ClusterModel) -> None:
    seen = model.see(pixels(model))
    assert seen.patch_score is not None
    raw, ids = model.raw_scores(seen)
    embedded = novelty_distance(seen.z, model.cluster_mean, ids) / model.cluster_radius[ids]
    assert torch.equal(raw, torch.maximum(embedded, seen.patch_score))
    far = replace(seen, patch_score=torch.full_like(seen.patch_score, 1e3))
    assert (model.raw_scores(far)[0] == 1e3).all()
    near = replace(seen, patch_score=torch.zeros_like(seen.patch_score))
    assert torch.equal(model.raw_scores(near)[0], embedded)
    assert torch.equal(model.novelty_scores(seen), raw / model.novelty_scale)


def test_a_small_defect_shows_in_the_patches_where_it_lies(model: ClusterModel) -> None:
    good = pixels(model)
    assert model.bank is not None
    clean, damaged = model.see(good).patch_score, model.see(scratched(good)).patch_score
    assert clean is not None and damaged is not None
    assert (damaged > 1.3 * clean).all()
    field = model.novelty_map(scratched(good))
    assert field.shape == (18, 12, 12)  # conv1 halves 24
    places = [divmod(int(one.argmax()), 12) for one in field]
    assert all(row <= 3 and column <= 3 for row, column in places)
    assert torch.allclose(field.amax((1, 2)), damaged, rtol=1e-4)
    # Control: without a defect the strangest place lies anywhere.
    assert any(max(divmod(int(one.argmax()), 12)) > 3 for one in model.novelty_map(good))


def test_what_is_seen_does_not_hang_on_the_batch(model: ClusterModel) -> None:
    images = pixels(model)
    whole, parts = model.see(images), model.see(images, batch=5)
    assert whole.patch_score is not None and parts.patch_score is not None
    assert torch.allclose(whole.patch_score, parts.patch_score, rtol=1e-4)
    assert torch.allclose(whole.z, model.embed_dataset(images), atol=1e-5)


def test_a_saved_run_gives_the_same_scores(run: Run, bank_run_folder: Path, tmp_path: Path) -> None:
    copy = load_run(shutil.copytree(bank_run_folder, tmp_path / "copy"))
    images = pixels(run.model)
    first, second = run.model.see(images), copy.model.see(images)
    assert first.patch_score is not None and second.patch_score is not None
    assert torch.equal(first.patch_score, second.patch_score)
    assert torch.equal(run.model.novelty_scores(first), copy.model.novelty_scores(second))
    assert run.info["novelty"]["bank"]["settings"] == SETTINGS.model_dump(mode="json")


@pytest.mark.parametrize(
    "bank",
    [
        "{layers: [conv2], cells: image, dim: 8, size: 8, learn: sample, neighbours: 3, local: true, max_cost: 10}",
        "{layers: [conv1], learn: gaussian, dim: 6, smooth: 1, reduce: top, max_cost: 10}",
        "{layers: [conv2, conv3], per_cluster: true, learn: coreset, size: 32, dim: 8, reduce: mean, max_cost: 10}",
        "{layers: [conv2], learn: stochastic_quantization, size: 16, dim: 8, stride: 2, min_groups: 2, max_cost: 10}",
    ],
    ids=["image", "gaussian", "per_cluster", "stochastic_quantization"],
)
def test_every_kind_of_bank_is_trained_saved_and_loaded(tiny_settings_text: str, tmp_path: Path, bank: str) -> None:
    trained = fitted(tiny_settings_text, tmp_path / "run", bank).model
    loaded = load_run(tmp_path / "run").model
    images = pixels(trained)
    first, second = trained.see(images).patch_score, loaded.see(images).patch_score
    assert first is not None and second is not None and torch.allclose(first, second, rtol=1e-5)
    assert 0.6 < float(first.median()) < 6  # an ordinary part is at the default weight, 2
    worse = trained.see(255 - images).patch_score
    assert worse is not None and float(worse.min()) > float(first.median())


@pytest.mark.parametrize("weight", [1.0, 2.5])
def test_the_held_out_good_part_in_the_middle_scores_the_weight(model: ClusterModel, weight: float) -> None:
    images, bank = pixels(model), model.bank
    assert bank is not None
    before = float(bank.patch_radius)
    bank.settings = bank.settings.model_copy(update={"weight": weight})
    set_radius(model, bank, images)
    scores = model.see(images).patch_score
    assert scores is not None and float(scores.quantile(0.5)) == pytest.approx(weight, rel=1e-4)
    assert float(bank.patch_radius) != before
    set_radius(model, bank, scratched(images))  # control: strange parts would make strange parts ordinary
    worse = model.see(images).patch_score
    assert worse is not None and float(worse.quantile(0.5)) < 0.9 * weight


def test_the_radius_of_a_run_comes_from_its_own_part_of_the_split(run: Run, image_folder: Path) -> None:
    with (run.path / "assignments.csv").open() as file:  # type: ignore[operator]
        rows = [line.strip().split(",") for line in file]
    files = [row[0] for row in rows[1:] if row[rows[0].index("split")] == "radius"]
    images = np.stack([cv2.imread(str(image_folder / name)) for name in files])
    scores = run.model.see(run.model.preprocess.geometry(torch.from_numpy(images))).patch_score
    assert len(files) >= 3 and scores is not None
    assert float(scores.quantile(0.5)) == pytest.approx(SETTINGS.weight, rel=1e-4)


def test_evaluate_and_predict_judge_by_the_bank_too(bank_run_folder: Path, tmp_path: Path) -> None:
    run = load_run(bank_run_folder)
    rng, images = np.random.default_rng(8), []
    (tmp_path / "disc").mkdir()
    for n in range(6):
        images.append(draw("disc", rng))
        images[n][2:7, 2:7] = (255, 0, 255) if n >= 3 else images[n][2:7, 2:7]
        cv2.imwrite(str(tmp_path / "disc" / f"{n}.png"), images[n])
    run.model.cluster_radius.mul_(1000)  # so that the patches decide
    patch_score = run.model.see(run.model.preprocess.geometry(torch.from_numpy(np.stack(images)))).patch_score
    assert patch_score is not None
    run.model.novelty_scale.fill_(float(patch_score[:3].max()) + 1e-3)
    rows = predict(run, str(tmp_path))
    assert [row.novelty_score for row in rows] == pytest.approx(
        (patch_score / run.model.novelty_scale).tolist(), rel=1e-4
    )
    assert [row.is_novel for row in rows] == [False, False, False, True, True, True]
    assert evaluate(run, str(tmp_path)).flagged["disc"] == (3, 6)
    run.model.bank = None  # control
    assert evaluate(run, str(tmp_path)).flagged["disc"] == (0, 6)


def tensors(run: Run) -> list[Tensor]:
    assert run.model.bank is not None
    return list(run.model.bank.state_dict().values())


def test_equal_seeds_give_equal_banks_and_others_do_not(
    run: Run, tiny_settings_text: str, tmp_path: Path, model: ClusterModel
) -> None:
    again = fitted(tiny_settings_text, tmp_path / "again", "{layers: [conv1, conv2], dim: 12, size: 32, max_cost: 10}")
    assert all(torch.equal(a, b) for a, b in zip(tensors(run), tensors(again), strict=True))
    one = material(model, pixels(model))
    first, same, other = (learn_bank(SETTINGS, model, replace(one, seed=n)).ordinary.state_dict() for n in (1, 1, 2))
    assert torch.equal(first["centres"], same["centres"])
    assert not torch.equal(first["centres"], other["centres"])


def test_the_same_number_of_cells_is_drawn_of_each_image(model: ClusterModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from trainer.bank import learning

    monkeypatch.setattr(learning, "SAMPLED_CELLS", 100)
    bank = learn_bank(SETTINGS, model, material(model, pixels(model)))
    ((rows, image),) = sample_cells([bank], model, material(model, pixels(model)))
    assert rows.shape == (18 * 6, 8 + 16) and image.bincount().tolist() == [6] * 18
    assert len(rows.unique(dim=0)) == len(rows)  # none of them twice


def test_of_more_images_than_cells_are_sampled_only_so_many_are_looked_at(
    model: ClusterModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = learn_bank(SETTINGS, model, material(model, pixels(model)))
    monkeypatch.setattr(learning, "SAMPLED_CELLS", 10)
    looked_at: list[int] = []

    def maps_of(layers: Any, model: ClusterModel, images: Tensor) -> Any:
        looked_at.append(len(images))
        return all_maps_of(layers, model, images)

    all_maps_of = learning.maps_of
    monkeypatch.setattr(learning, "maps_of", maps_of)
    ((rows, image),) = sample_cells([bank], model, material(model, pixels(model)))
    assert rows.shape == (10, 8 + 16) and len(image.unique()) == 10 and looked_at == [10]
    assert image.tolist() == sorted(image.tolist()) and int(image.max()) < 18


@pytest.mark.parametrize("cells", ["patches", "image"])
def test_identical_images_are_refused(model: ClusterModel, cells: str) -> None:
    one = pixels(model)[:1].repeat(12, 1, 1, 1)
    settings = SETTINGS.model_copy(update={"cells": cells})
    for images in (one, torch.full_like(one, 90)):
        with pytest.raises(
            DataError, match=r"finds nothing to learn: all 12 good parts look alike to its layers conv1, conv2; record"
        ):
            learn_bank(settings, model, material(model, images))
    # Control: one that differs in one pixel is something to learn from.
    one[3, 5, 5] += 40
    assert torch.isfinite(learn_bank(settings, model, material(model, one)).ordinary.centres).all()  # type: ignore[operator]


@pytest.mark.parametrize("learn", ["kmeans", "gaussian"])
def test_there_are_no_more_directions_than_cells_to_find_them_in(model: ClusterModel, learn: str) -> None:
    images = pixels(model, per_kind=1)  # 3 images of 3 x 3 cells, 16 channels
    settings = BankSettings(layers=("conv3",), learn=learn, dim=16)
    bank = learn_bank(settings.model_copy(update={"stride": 2}), model, material(model, images))
    assert bank.cells.out_dim == 2  # of 3 cells
    assert learn_bank(settings, model, material(model, images)).cells.out_dim == 16  # control: of 27
    score, field = bank(
        model.encoder.with_maps(model.input_of(images), ("conv3",))[1], torch.zeros(3, dtype=torch.int64)
    )
    assert torch.isfinite(score).all() and field.shape == (3, 1, 1)


def test_an_unknown_layer_is_refused_and_those_that_are_there_are_named(model: ClusterModel) -> None:
    settings = SETTINGS.model_copy(update={"layers": ("conv1", "fire8")})
    with pytest.raises(
        DataError, match=r"novelty\.bank\.layers names 'fire8', which encoder conv does not have; it has conv1, conv2"
    ):
        learn_bank(settings, model, material(model, pixels(model)))


def test_an_encoder_without_maps_is_refused(tiny_settings_text: str, tmp_path: Path) -> None:
    text = tiny_settings_text.replace("{target_frr: 0.1}", "{target_frr: 0.1, bank: {layers: [conv1]}}")
    for wanted in (text, text.replace("{layers: [conv1]}", "auto")):
        with pytest.raises(DataError, match=r"encoder mlp has no feature maps, which novelty\.bank looks at"):
            fit(load_text(TrainSettings, wanted, "mlp.yaml"), FitOptions(out=tmp_path / str(len(wanted))))


def test_the_message_of_maps_that_are_not_there_names_the_setting(tiny_run_folder: Path) -> None:
    encoder = load_run(tiny_run_folder).model.encoder
    with pytest.raises(DataError, match=r"encoder mlp has no feature maps, which novelty\.bank looks at"):
        encoder.with_maps(torch.zeros(1, 3, 24, 24), ("conv1",))


def test_a_stride_that_leaves_no_cell_is_refused() -> None:
    torch.manual_seed(0)
    encoder = ConvEncoder(ConvSettings(channels=(4, 4, 4), dim=4), (3, 16, 16))
    preprocess = Preprocess(PreprocessSettings(resize="none"), 16, 16)
    model = ClusterModel(preprocess, encoder, Projection(ProjectionSettings(), 4, 10), 1)
    images = torch.randint(0, 256, (8, 16, 16, 3), dtype=torch.uint8)
    settings = BankSettings(layers=("conv3",), stride=4)
    with pytest.raises(DataError, match=r"novelty\.bank\.stride is 4, but the maps of conv3 have 2x2 cells, expected"):
        learn_bank(settings, model, material(model, images))
    there = settings.model_copy(update={"stride": 2})  # control: the second of two
    assert learn_bank(there, model, material(model, images)).settings.stride == 2


@pytest.mark.parametrize(
    ("bank", "words"),
    [
        ("{learn: gaussian, cells: image}", "expected cells: patches, per_cluster: false and local: false"),
        ("{learn: kmedoids}", "learn"),
        ("{size: 0}", "size"),
        ("{layers: [conv1, conv2, conv1]}", "layers are conv1, conv2, conv1, expected each once"),
        ("{colour: red}", "colour"),
        ("big", "bank"),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_name(tiny_settings_text: str, bank: str, words: str) -> None:
    from configs import ConfigError

    text = with_bank(tiny_settings_text, f"{{target_frr: 0.1, bank: {bank}}}")
    with pytest.raises(ConfigError, match=re.escape(words)):
        load_text(TrainSettings, text, "bank.yaml")


def test_without_a_bank_nothing_of_it_is_there(tiny_run_folder: Path, model: ClusterModel) -> None:
    plain = load_run(tiny_run_folder)
    images: Any = torch.zeros(2, 24, 24, 3, dtype=torch.uint8)
    assert plain.model.bank is None and plain.model.see(images).patch_score is None
    assert "bank" not in plain.info["novelty"] and not [n for n in plain.model.state_dict() if "bank" in n]
    with pytest.raises(ValueError, match=r"has no bank, so no novelty_map; set novelty\.bank"):
        plain.model.novelty_map(images)
