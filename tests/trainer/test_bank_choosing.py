from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from configs import load_text
from tests.conftest import TINY
from trainer import FitOptions, fit, load_run
from trainer.bank import choosing
from trainer.bank.bank import Bank
from trainer.bank.choosing import Choice, Trial, affordable, candidates, choose
from trainer.bank.cost import bank_operations, check_cost, cost_of, encoder_operations
from trainer.bank.fitting import check_bank
from trainer.bank.learning import Material, learn_bank, learn_banks
from trainer.bank.settings import BankSettings
from trainer.encoders.conv import ConvEncoder, ConvSettings
from trainer.errors import DataError
from trainer.model import ClusterModel
from trainer.preprocess import Preprocess, PreprocessSettings
from trainer.projection import Projection, ProjectionSettings
from trainer.settings import TrainSettings

SIDE_PX = 24
LAYERS = ("conv2", "conv3")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, image_folder: Path) -> ClusterModel:
    text = TINY.format(path=image_folder).replace(
        "{name: mlp, hidden: [32], dim: 8}", "{name: conv, channels: [8, 16, 16], dim: 8}"
    )
    return fit(
        load_text(TrainSettings, text, "conv.yaml"), FitOptions(out=tmp_path_factory.mktemp("run") / "conv")
    ).model


def plain_parts(n: int = 40) -> Material:
    """Even grey parts with a little noise: any drawn defect stands out."""
    rng = np.random.default_rng(0)
    pixels = np.clip(120 + rng.normal(0, 4, (n, SIDE_PX, SIDE_PX, 3)), 0, 255).astype(np.uint8)
    return Material(torch.from_numpy(pixels), np.arange(n), torch.zeros(n, dtype=torch.int64), seed=0)


def few(layers: object) -> list[BankSettings]:
    return [
        BankSettings(layers=LAYERS, size=16, dim=8, max_cost=10),
        BankSettings(layers=LAYERS, size=4096, dim=16, max_cost=0.01),
        BankSettings(layers=("conv3",), size=1, dim=1, max_cost=10),
    ]


def test_the_bank_that_finds_drawn_defects_is_chosen_and_what_was_tried_is_kept(
    model: ClusterModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choosing, "candidates", few)
    said: list[str] = []
    choice = choose(model, plain_parts(), said.append)
    assert choice.chosen.settings.size == 16 and choice.chosen.synthetic_auroc > 0.75
    assert [trial.settings.size for trial in choice.trials].count(4096) == 0  # it costs more than its bound allows
    assert len(choice.trials) == 6 and len(said) == 1  # two banks with three reductions each
    worst = choice.trials[-1]
    assert worst.criterion < choice.chosen.criterion
    assert "AUROC" in choice.why and choice.plain()["chosen"]["settings"]["size"] == 16


def test_of_two_equal_banks_the_cheaper_one_is_taken() -> None:
    dear, cheap, worse = (
        Trial(BankSettings(size=size), auroc, None, 0.0, cost)
        for size, auroc, cost in ((3, 0.9, 0.2), (2, 0.897, 0.1), (1, 0.88, 0.01))
    )
    assert choosing.pick([worse, cheap, dear]) == Choice([dear, cheap, worse], cheap)
    assert choosing.pick([worse, dear]).chosen is dear


def test_kept_clusters_count_as_much_as_drawn_defects() -> None:
    trial = Trial(BankSettings(), 0.8, 0.6, 0.0, 0.1)
    assert trial.criterion == pytest.approx(0.7)


def test_clusters_are_kept_from_a_bank_only_where_there_are_four(
    model: ClusterModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choosing, "candidates", lambda layers: few(layers)[:1])
    parts = plain_parts()
    shades = torch.arange(40) % 4
    lighter = Material((parts.pixels + 20 * shades[:, None, None, None].to(torch.uint8)), parts.groups, shades, 0)
    with_clusters = choose(model, lighter, lambda text: None).chosen
    assert with_clusters.cluster_auroc is not None
    assert choose(model, parts, lambda text: None).chosen.cluster_auroc is None


@pytest.mark.parametrize("seed", range(4))
def test_a_cluster_that_leaves_too_few_others_is_not_kept_away(
    model: ClusterModel, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(choosing, "candidates", lambda layers: few(layers)[2:])
    parts, ids = plain_parts(24), torch.zeros(24, dtype=torch.int64)
    ids[:3] = torch.arange(1, 4)  # all others are of cluster 0
    chosen = choose(model, replace(parts, clusters=ids, seed=seed), lambda text: None).chosen
    assert chosen.cluster_auroc is not None  # by the three small ones, each of one part


def test_an_encoder_too_small_for_every_bank_is_told_so(model: ClusterModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "candidates", lambda layers: few(layers)[1:2])
    with pytest.raises(DataError, match=r"every bank that is tried costs more than its bound for encoder conv"):
        choose(model, plain_parts(), lambda text: None)


def test_a_candidate_whose_stride_leaves_no_cell_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = ConvEncoder(ConvSettings(channels=(4, 4, 4), dim=4), (3, 16, 16))
    preprocess = Preprocess(PreprocessSettings(resize="none"), 16, 16)
    small = ClusterModel(preprocess, encoder, Projection(ProjectionSettings(), 4, 10), 1)
    whole = BankSettings(layers=("conv3",), size=4, dim=4, max_cost=10)  # 2 x 2 cells
    monkeypatch.setattr(
        choosing, "candidates", lambda layers: [whole, whole.model_copy(update={"stride": 4, "size": 1})]
    )
    assert affordable(small, torch.zeros(1, 16, 16, 3, dtype=torch.uint8)) == [whole]


@pytest.mark.parametrize(
    ("bank", "words"),
    [
        ("auto", "every bank that is tried costs more"),
        ("{layers: [conv2, conv3], size: 4096}", "costs .* of the encoder's multiply-adds, max_cost allows 20%"),
        ("{layers: [fire8]}", "names 'fire8', which encoder conv does not have"),
        ("{layers: [conv2], size: 8, dim: 4}", None),
        ("null", None),
    ],
)
def test_a_bank_that_cannot_be_is_refused_before_anything_is_trained(
    model: ClusterModel, monkeypatch: pytest.MonkeyPatch, bank: str, words: str | None
) -> None:
    monkeypatch.setattr(choosing, "candidates", lambda layers: few(layers)[1:2])
    text = TINY.format(path="nowhere").replace("{target_frr: 0.1}", f"{{target_frr: 0.1, bank: {bank}}}")
    settings, part = load_text(TrainSettings, text, "bank.yaml"), plain_parts(1).pixels
    if words is None:
        check_bank(model, settings, part)
        return
    with pytest.raises(DataError, match=words):
        check_bank(model, settings, part)


def test_banks_learned_together_are_those_learned_alone(model: ClusterModel) -> None:
    parts = plain_parts()
    wanted = [*few(()), BankSettings(layers=("conv2",), learn="gaussian", dim=4)]
    for settings, together in zip(wanted, learn_banks(wanted, model, parts), strict=True):
        alone = learn_bank(settings, model, parts).state_dict()
        assert all(torch.equal(value, alone[name]) for name, value in together.state_dict().items())


def test_one_group_cannot_be_split_into_folds_and_that_is_said(model: ClusterModel) -> None:
    parts = plain_parts(6)
    alone = Material(parts.pixels, np.zeros(6, np.int64), parts.clusters, 0)
    with pytest.raises(DataError, match=r"auto needs 2 groups .* there is 1; name a bank"):
        choose(model, alone, lambda text: None)


def test_candidates_are_for_the_maps_that_the_encoder_has() -> None:
    for layers in (("conv1", "conv2", "conv3"), tuple(f"fire{n}" for n in range(2, 10)), ("last",)):
        assert all(set(settings.layers) <= set(layers) for settings in candidates(layers))
    assert candidates([f"fire{n}" for n in range(2, 10)])[-1].layers == ("fire3", "fire5", "fire8")


def test_the_cost_is_counted_by_hand(model: ClusterModel) -> None:
    parts = plain_parts(8)
    # conv: 5x5 stride 2 to 12x12, to 6x6, 3x3 to 3x3, then a linear layer of 3 x 3 x 16 inputs.
    expected = 144 * 8 * 75 + 36 * 16 * 200 + 9 * 16 * 144 + 144 * 8
    assert encoder_operations(model, parts.pixels[:1]) == expected
    bank = learn_bank(BankSettings(layers=("conv3",), size=5, dim=4), model, parts)
    maps = {"conv3": torch.zeros(1, 16, 3, 3)}
    assert bank_operations(bank, maps) == 9 * 16 * 4 + 9 * 4 * 5
    assert cost_of(bank, model, parts.pixels[:1]) == pytest.approx((9 * 16 * 4 + 9 * 4 * 5) / expected)


def test_centres_that_clusters_bring_beyond_the_size_are_counted(model: ClusterModel) -> None:
    parts = plain_parts(32)
    of_eight = Material(parts.pixels, parts.groups, torch.arange(32) % 8, 0)
    bank = learn_bank(BankSettings(layers=("conv3",), size=8, dim=4, per_cluster=True), model, of_eight)
    assert bank_operations(bank, {"conv3": torch.zeros(1, 16, 3, 3)}) == 9 * 16 * 4 + 9 * 4 * 64  # 8 of each


def test_a_bank_that_costs_too_much_is_refused_with_the_size_that_would_fit(model: ClusterModel) -> None:
    parts = plain_parts()
    bank = learn_bank(BankSettings(layers=LAYERS, size=200, dim=8, max_cost=0.2), model, parts)
    with pytest.raises(DataError, match=r"costs \d+% of the encoder's .* allows 20%; size (\d+) would fit") as caught:
        check_cost(bank, model, parts.pixels[:1])
    size = int(str(caught.value).split("size ")[1].split(" ")[0])
    fitting = bank.settings.model_copy(update={"size": size})
    assert cost_of(Bank(fitting, [16, 16]), model, parts.pixels[:1]) <= 0.2
    too_large = bank.settings.model_copy(update={"size": size + 2})
    assert cost_of(Bank(too_large, [16, 16]), model, parts.pixels[:1]) > 0.2


def test_fit_chooses_a_bank_from_the_training_parts_alone_and_says_so(
    tmp_path: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    monkeypatch.setattr(choosing, "candidates", lambda layers: few(layers)[:1])
    learned = learn_banks

    def spy(wanted: Sequence[BankSettings], model: ClusterModel, material: Material) -> list[Bank]:
        seen.append(len(material.pixels))
        return learned(wanted, model, material)

    monkeypatch.setattr(choosing, "learn_banks", spy)
    text = TINY.format(path=image_folder).replace(
        "{name: mlp, hidden: [32], dim: 8}", "{name: conv, channels: [8, 16, 16], dim: 8}"
    )
    text = text.replace("{target_frr: 0.1}", "{target_frr: 0.1, bank: auto}")
    run = fit(load_text(TrainSettings, text, "conv.yaml"), FitOptions(out=tmp_path / "run"))
    assert run.info["train"]["n_train"] == 36 and max(seen) == 18  # half of the training parts at a time, no others
    kept = load_run(tmp_path / "run").info["novelty"]["bank"]
    assert kept["choice"]["why"] and kept["settings"] == kept["choice"]["chosen"]["settings"]
