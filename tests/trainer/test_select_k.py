from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trainer.assignment import target_distribution
from trainer.cli import main
from trainer.errors import DataError
from trainer.k_criteria import Embedding, KFigures, divergence, measure
from trainer.select_k import KChoice, KRow, mean_row, parse_ks, recommend


def blobs(k: int, dim: int, n: int, seed: int = 0, apart: float = 8.0) -> Embedding:
    """`k` round blobs of variance 1, the nearest pair of centres `apart`."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(k, dim))
    gaps = np.linalg.norm(centres[:, None] - centres[None], axis=2) + 1e9 * np.eye(k)
    centres *= apart / gaps.min() if k > 1 else 1.0
    z = centres[rng.integers(0, k, n)] + rng.normal(size=(n, dim))
    return Embedding(torch.from_numpy(z.astype(np.float32)), np.arange(n), False, seed)


def choose(embedding: Embedding, ks: list[int]) -> KChoice:
    return recommend([mean_row([figures]) for figures in measure(embedding, ks)])


@pytest.mark.parametrize("k", [2, 3, 5])
def test_as_many_clusters_are_found_as_were_drawn(k: int) -> None:
    choice = choose(blobs(k, 8, 300), [2, 3, 4, 5, 6])
    assert (choice.kind, choice.k) == ("clear", k)
    assert choice.why.startswith(f"{k}: the largest K whose clusters all come back") and f"at {k + 1}" in choice.why


def test_control_one_shapeless_cloud_has_no_clusters_though_it_splits_in_the_same_place_every_time() -> None:
    z = np.random.default_rng(0).normal(size=(400, 6)) * np.array([6, 1, 1, 1, 1, 1])
    cloud = Embedding(torch.from_numpy(z.astype(np.float32)), np.arange(400), False, 0)
    figures = list(measure(cloud, [2, 3]))
    assert figures[0].weakest > 0.9  # stable, and yet nothing
    choice = recommend([mean_row([one]) for one in figures])
    assert (choice.kind, choice.k) == ("one_group", 1) and "no clear answer" in choice.why


def test_copies_of_a_part_do_not_make_a_cluster_stable_when_they_are_one_group() -> None:
    rng = np.random.default_rng(0)
    z = torch.from_numpy(rng.normal(size=(60, 4)).astype(np.float32)).repeat(5, 1)
    apart = Embedding(
        z + 0.01 * torch.randn(z.shape, generator=torch.Generator().manual_seed(0)), np.arange(300), False, 0
    )
    grouped = replace(apart, groups=np.tile(np.arange(60), 5))
    as_parts, as_images = (next(one.ari for one in measure(e, [12])) for e in (grouped, apart))
    assert as_images > as_parts + 0.1


def row(k: int, weakest: float, gap: float, **more: Any) -> KRow:
    return KRow(
        **{
            "k": k,
            "weakest": weakest,
            "ari": weakest,
            "seeds_ari": None,
            "gap": gap,
            "gap_error": 0.001,
            "generalizability": 1.0,
            "silhouette": 0.2,
            **more,
        }
    )


@pytest.mark.parametrize(
    ("rows", "kind", "k"),
    [
        ([row(2, 0.99, 0.1), row(3, 0.95, 0.3), row(4, 0.5, 0.4)], "clear", 3),
        ([row(2, 0.99, 0.1), row(3, 0.78, 0.3), row(4, 0.74, 0.4)], "likely", 3),
        ([row(2, 0.99, 0.1), row(3, 0.95, 0.3)], "at_least", 3),
        ([row(2, 0.5, 0.1), row(3, 0.6, 0.3)], "unclear", None),
        ([row(2, 0.99, 0.01), row(3, 0.95, 0.0)], "one_group", 1),
        ([row(2, 0.99, 0.3), row(3, 0.95, 0.2), row(4, 0.2, 0.1)], "clear", 2),  # stable, but a worse fit than 2
        ([row(2, 0.99, 0.1, gap_error=0.06), row(3, 0.2, 0.1, gap_error=0.06)], "one_group", 1),
    ],
)
def test_the_rule(rows: list[KRow], kind: str, k: int | None) -> None:
    choice = recommend(rows)
    assert (choice.kind, choice.k) == (kind, k)


def test_the_validation_loss_takes_the_cluster_frequencies_of_the_training_part() -> None:
    q = torch.rand(40, 3, generator=torch.Generator().manual_seed(0))
    log_q = (q / q.sum(1, keepdim=True)).log()
    train, validation = log_q[:30], log_q[30:]
    p = target_distribution(train.exp())
    by_hand = float((p * (p.log() - train)).sum(1).mean())
    frequency = train.exp().sum(0)
    assert divergence(train, frequency) == pytest.approx(by_hand, rel=1e-5)
    own, frozen = divergence(validation, validation.exp().sum(0)), divergence(validation, frequency)
    assert abs(own - frozen) > 1e-4  # so the choice matters
    assert divergence(validation, 7 * frequency) == pytest.approx(frozen, rel=1e-5)  # shares count, not sizes


def test_seeds_are_compared_and_figures_averaged() -> None:
    labels = np.array([0, 0, 1, 1])
    one = KFigures(2, 0.8, 0.7, 0.2, 0.01, 1.0, None, labels)
    averaged = mean_row([one, replace(one, weakest=0.6, labels=1 - labels)])
    assert averaged.weakest == pytest.approx(0.7) and averaged.seeds_ari == 1.0 and averaged.silhouette is None


@pytest.mark.parametrize(("text", "ks"), [("2..5", [2, 3, 4, 5]), ("4,8,6", [4, 6, 8]), ("2..3, 9", [2, 3, 9])])
def test_ranges_are_read(text: str, ks: list[int]) -> None:
    assert parse_ks(text) == ks


@pytest.mark.parametrize("text", ["", "1..5", "a", "5..2", "2..", "-3", "2..999999999"])
def test_other_ranges_are_refused(text: str) -> None:
    with pytest.raises(DataError, match="expected whole numbers of at least 2, as 2..20"):
        parse_ks(text)


def test_more_clusters_than_the_images_carry_are_refused() -> None:
    with pytest.raises(DataError, match="up to 30, but there are 60 images in 60 groups with 60 different"):
        list(measure(blobs(2, 4, 60), [2, 30]))


def test_a_group_that_is_most_of_the_set_is_named_and_not_the_method() -> None:
    one_lot = replace(
        blobs(2, 4, 300), groups=np.maximum(np.arange(300) - 279, 0)
    )  # 280 images of one lot, 20 single ones
    with pytest.raises(DataError, match=r"--k goes up to 12, but groups are so uneven .* data\.groups"):
        list(measure(one_lot, [2, 12]))


def test_the_command_leaves_curves_a_page_and_runs_and_reuses_them(
    tiny_settings_text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(tiny_settings_text)
    command = ["select-k", str(config), "--k", "2..4", "--seeds", "1", "--out", str(tmp_path / "k"), "--json"]
    assert main(command) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["recommendation"]["k"] in {3, 4} and [one["k"] for one in result["rows"]] == [2, 3, 4]
    assert json.loads((tmp_path / "k" / "select_k.json").read_text()) == result
    page = (tmp_path / "k" / "select_k.html").read_text(encoding="utf-8")
    assert "<polyline" in page and "http" not in page and result["recommendation"]["why"] in page
    assert main([*command, "--set", "pretrain.epochs=4"]) == 2
    assert "holds a run of other settings" in capsys.readouterr().err
    assert main(command) == 0
    captured = capsys.readouterr()
    assert "reusing" in captured.err and json.loads(captured.out) == result
