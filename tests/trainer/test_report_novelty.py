"""Novelty in report.html: the false-reject curve, maps over the strangest parts, the bank in words."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from configs import load_text
from tests.images import draw, write_png
from trainer import FitOptions, Run, fit, load_run
from trainer.bank.settings import BankSettings
from trainer.novelty import NoveltySettings, calibrate
from trainer.report import write_report
from trainer.report.bank_section import bank_section, in_words
from trainer.report.chart import Steps, steps
from trainer.report.novelty_curve import curve_of, false_rejects
from trainer.report.novelty_maps import heat, overlay, seen_by
from trainer.settings import TrainSettings
from trainer.suspects import Suspects, write_suspects

BANK = """
data: {{path: {path}}}
preprocess: {{height_px: 32, width_px: 32}}
encoder: {{name: conv, channels: [8, 16, 16], dim: 4}}
pretrain: {{epochs: 1}}
method: {{name: ae_kmeans, n_clusters: 1, n_init: 1}}
novelty: {{target_frr: 0.1, bank: {{layers: [conv1], size: 16, dim: 8, max_cost: 10}}}}
train: {{batch_size: 16, device: cpu}}
"""


def draw_spot(side_px: int = 32) -> NDArray[np.uint8]:
    """A disc with a white spot in its upper right quarter."""
    image = draw("disc", np.random.default_rng(99), side_px)
    image[6:9, 23:26] = 255
    return image


@pytest.fixture(scope="module")
def bank_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder, rng = tmp_path_factory.mktemp("bank"), np.random.default_rng(0)
    for n in range(40):
        write_png(folder / "parts" / f"{n:02d}.png", draw("disc", rng))
    return fit(load_text(TrainSettings, BANK.format(path=folder / "parts"), "bank.yaml"), FitOptions(folder / "run"))


def page_of(run: Run, tmp_path: Path) -> str:
    write_report(run, None, tmp_path / "report.html")
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def section(page: str, title: str) -> str:
    """The HTML after an h3, up to the next heading."""
    return re.split(r"<h[23]>", page.split(f"<h3>{title}</h3>", 1)[1])[0]


def test_the_curve_by_hand_with_one_part_per_group() -> None:
    # G = 4, edge at the third score: k = 1..4, share (4 - k) / 4. At k = 4 the rate is Beta(1, 4), at k = 1 Beta(4, 1), whose
    # quantile functions are 1 - (1 - q)^(1/4) and q^(1/4).
    curve = false_rejects(np.array([4.0, 1.0, 3.0, 2.0]), np.ones(4), 3.0)
    assert curve.threshold.tolist() == pytest.approx([1 / 3, 2 / 3, 1.0, 4 / 3]) and curve.groups == 4
    assert curve.share.tolist() == [0.75, 0.5, 0.25, 0.0]
    assert (curve.low[3], curve.high[3]) == pytest.approx((1 - 0.975**0.25, 1 - 0.025**0.25))
    assert (curve.low[0], curve.high[0]) == pytest.approx((0.025**0.25, 0.975**0.25))
    assert curve.at(1.0)[0] == 0.25 and curve.at(1.2)[0] == 0.25 and curve.at(0.1) == (1.0, 1.0, 1.0)


def test_a_group_counts_once_in_the_curve_and_equal_scores_are_one_step() -> None:
    # Two groups: the first has three parts of weight 1/3, two of them alike.
    weights = np.array([1, 1, 1, 3], np.float32) / np.float32(3)
    curve = false_rejects(np.array([1, 1, 2, 3], np.float32), weights, 2.0)
    assert curve.threshold.tolist() == [0.5, 1.0, 1.5] and curve.groups == 2
    assert curve.share.tolist() == pytest.approx([2 / 3, 1 / 2, 0.0], abs=1e-5)
    split = false_rejects(np.array([1, 3], np.float32), np.ones(2), 2.0)
    assert split.share.tolist() != curve.share.tolist()


def test_the_band_at_the_edge_is_that_of_the_documentation() -> None:
    # docs/novelty.md: 63 groups at 5 %: between 1 and 11 % in 95 of 100 cases.
    scores = np.arange(1, 64, dtype=np.float32)
    calibration = calibrate(scores, np.arange(63), NoveltySettings(target_frr=0.05))
    curve = false_rejects(calibration.scores, calibration.weights, calibration.scale)
    share, low, high = curve.at(1.0)
    assert share == pytest.approx(2 / 63) and (round(low, 2), round(high, 2)) == (0.01, 0.11)
    assert (np.diff(curve.share) < 0).all() and (np.diff(curve.high) < 0).all() and (curve.low < curve.high).all()


def test_lines_do_end_up_inside_the_band_and_more_strange_ones_would_not() -> None:
    # 400 lines, each calibrated on 63 parts: the true share above the edge of uniform scores is 1 - edge.
    rng, inside, moved = np.random.default_rng(0), 0, 0
    for _ in range(400):
        scores = rng.random(63).astype(np.float32)
        calibration = calibrate(scores, np.arange(63), NoveltySettings(target_frr=0.05))
        _, low, high = false_rejects(calibration.scores, calibration.weights, calibration.scale).at(1.0)
        inside += low <= 1 - calibration.scale <= high
        moved += (
            low <= 1 - calibration.scale / 1.15 <= high
        )  # negative control: parts 15 % stranger than in the calibration
    assert 365 <= inside <= 395 and moved < 100


def test_the_drawn_curve_has_its_marks_and_stays_inside_the_picture() -> None:
    curve = false_rejects(np.arange(1, 20, dtype=np.float64), np.ones(19), 18.0)
    svg = steps(
        Steps(curve.threshold, curve.share, curve.low, curve.high),
        (1.0, "edge"),
        {"target <0.01>": 0.01, "promised 0.05": 0.05},
        0.4,
        "threshold",
    )
    assert "1 = edge" in svg and "promised 0.05" in svg and "target &lt;0.01&gt;" in svg
    points = [tuple(map(float, p.split(","))) for p in " ".join(re.findall(r'points="([^"]+)"', svg)).split()]
    assert all(50 <= x <= 620.1 and 11.9 <= y <= 196.1 for x, y in points)


def test_what_lies_far_from_the_edge_does_not_squeeze_the_curve() -> None:
    scores = np.append(np.arange(1, 20, dtype=np.float64), 500.0)
    curve = false_rejects(scores, np.ones(20), 19.0)
    svg = steps(Steps(curve.threshold, curve.share, curve.low, curve.high), (1.0, "edge"), {}, 0.4, "threshold")
    line = re.findall(r'<polyline points="([^"]+)"', svg)[0].split()
    # The outlier, at 26 edges, is off the picture: the share ends on the step of 1 of 20 and does not fall to 0 at the border.
    assert line[-1] == f"620.0,{196 - 0.05 / 0.4 * 184:.1f}"
    assert ">2</text>" in svg and ">0 %</text>" in svg and ">40 %</text>" in svg


def test_a_part_of_one_picture_is_hot_where_its_map_is_high() -> None:
    grey = np.full((64, 64, 1), 128, np.uint8)
    edges = np.full((8, 8), 0.2, np.float32)
    edges[1, 6] = 4.0
    mixed = overlay(grey, edges).astype(int)
    assert mixed.shape == (64, 64, 3)
    assert np.array_equal(mixed[60, 4], heat(np.full((1, 1), 128, np.float32), np.full((1, 1), 0.2, np.float32))[0, 0])
    assert (np.abs(mixed - mixed[60, 4]).sum(2) > 60)[:20, 40:].any() and (mixed[40:] == mixed[60, 4]).all()
    assert (mixed[:24, 40:] == 255).all(2).any()  # the outline of the edge
    assert (
        not (overlay(grey, np.full((8, 8), 0.99, np.float32)) == 255).all(2).any()
    )  # control: below the edge, no outline


def test_the_scale_is_linear_and_ends_at_twice_the_edge() -> None:
    black = np.zeros((1, 4), np.float32)
    colours = heat(black, np.array([[0.0, 1.0, 2.0, 9.0]], np.float32))[0].astype(int)
    assert colours[2].tolist() == colours[3].tolist() and colours[0].sum() < colours[1].sum() < colours[2].sum()


def test_the_map_is_in_edges_and_shows_the_spot(bank_run: Run) -> None:
    import torch

    model, image = bank_run.model, draw_spot()
    seen, edges = seen_by(model, image)
    assert np.array_equal(seen, image)  # 32x32 is the encoder's input
    score = float(model.novelty_scores(model.see(torch.from_numpy(image)[None]))[0])
    assert edges.max() == pytest.approx(score, rel=1e-5) and score > 1  # reduce: max
    row, column = np.unravel_index(edges.argmax(), edges.shape)
    assert row in {2, 3, 4, 5} and column in {10, 11, 12, 13}


def test_the_report_of_a_run_with_a_bank_has_maps_beside_plain_pictures(bank_run: Run, tmp_path: Path) -> None:
    page = page_of(bank_run, tmp_path)
    maps = section(page, "Maps of the strangest images")
    assert maps.count('class="map" src="data:image/jpeg;base64,') == 24 and maps.count("<figure") == 12
    assert "2 times the edge or more, linear" in maps and "linear-gradient" in maps
    assert "http://" not in page and "https://" not in page and "<script" not in page and 'src="/' not in page
    bank = section(page, "The bank")
    assert (
        "each cell of conv1" in bank and "the nearest of 16 centres found by k-means" in bank and "patch_radius" in bank
    )
    assert f"{bank_run.info['novelty']['bank']['patch_radius']:.3g}" in bank


def test_the_picture_in_the_report_is_the_part_and_the_other_one_its_map(bank_run: Run, tmp_path: Path) -> None:
    import base64

    maps = section(page_of(bank_run, tmp_path), "Maps of the strangest images")
    plain, laid_over = (
        cv2.imdecode(np.frombuffer(base64.b64decode(url), np.uint8), cv2.IMREAD_COLOR)
        for url in re.findall(r"base64,([^\"]+)", maps)[:2]
    )
    assert plain.shape == laid_over.shape == (160, 160, 3) and np.abs(plain.astype(int) - laid_over).mean() > 5


def test_suspects_are_shown_with_their_maps(bank_run: Run, tmp_path: Path) -> None:
    names = [row["file"] for row in map(dict, _rows(bank_run))]
    is_suspect = np.arange(len(names)) == 3
    assert bank_run.path is not None
    write_suspects(
        bank_run.path, names, Suspects(np.full(len(names), 2.5), np.where(is_suspect, 1e-4, 1), is_suspect, 0.1)
    )
    maps = section(page_of(bank_run, tmp_path), "Maps of the suspects")
    assert maps.count("<figure") == 1 and "2.50 times usual" in maps and f'title="{names[3]}"' in maps
    (bank_run.path / "suspects.csv").unlink()
    assert "Maps of the suspects" not in page_of(bank_run, tmp_path)


def _rows(run: Run) -> list[dict[str, str]]:
    import csv

    assert run.path is not None
    with (run.path / "assignments.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_without_a_bank_has_a_curve_and_no_maps(copied_run: Path, tmp_path: Path) -> None:
    run = load_run(copied_run)
    page = page_of(run, tmp_path)
    curve = section(page, "False rejects")
    _, low, high = curve_of(run.model).at(1.0)
    assert f"between {low:.2%} and {high:.2%}" in curve and "target 10 %" in curve and "1 = edge" in curve
    assert f"on the {run.info['novelty']['groups']} held-out groups" in curve
    assert "The bank" not in page and 'class="map"' not in page and "Maps of" not in page


def test_an_uncalibrated_run_draws_no_curve(copied_run: Path, tmp_path: Path) -> None:
    run = load_run(copied_run)
    run.info["novelty"] |= {"kind": "uncalibrated"}
    run.info["novelty"] = {k: v for k, v in run.info["novelty"].items() if not k.endswith("_frr")}
    assert "False rejects" not in page_of(run, tmp_path)


def test_the_promise_is_drawn_beside_the_target_where_groups_are_too_few(copied_run: Path, tmp_path: Path) -> None:
    run = load_run(copied_run)
    run.info["novelty"] |= {"target_frr": 0.01, "promised_frr": 0.053}
    curve = section(page_of(run, tmp_path), "False rejects")
    assert "target 1 %" in curve and "promised 5.3 %" in curve


def test_maps_leave_gaps_where_the_images_are_gone(bank_run: Run, tmp_path: Path) -> None:
    settings = bank_run.settings
    gone = settings.model_copy(update={"data": settings.data.model_copy(update={"path": "/nowhere"})})
    run = Run(bank_run.path, gone, bank_run.model, bank_run.parts, bank_run.info, bank_run.metrics)
    page = page_of(run, tmp_path)
    assert "data:image" not in page and "not there" in section(page, "Maps of the strangest images")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"layers": ("a", "b", "c"), "stride": 2}, "every second cell, across and down, of a, b and c"),
        ({"learn": "gaussian", "smooth": 1}, "normal distribution of good parts at that place, shared with the places up to 1 cells"),
        ({"cells": "image", "learn": "sample", "neighbours": 16, "local": True}, "the 16 nearest of 512 points drawn at random, in radii"),
        ({"cells": "image"}, "It has no map of places"),
        ({"reduce": "top", "top_share": 0.1}, "mean of the strangest 10% of cells"),
        ({"reduce": "max"}, "one cell above the edge makes the part novel"),
        ({"per_cluster": True, "min_groups": 3}, "of those of the image's own cluster; a centre must be known from 3 groups"),
    ],
)  # fmt: skip
def test_the_bank_is_told_in_words(settings: dict[str, Any], said: str) -> None:
    assert said in in_words(BankSettings(**settings))


def test_how_the_bank_was_chosen_is_a_table_that_marks_the_chosen_one() -> None:
    def trial(size: int, auroc: float, clusters: float | None) -> dict[str, Any]:
        settings = BankSettings(size=size).model_dump(mode="json")
        return {"settings": settings, "synthetic_auroc": auroc, "cluster_auroc": clusters, "spread": 0.01, "cost": 0.1}

    bank = {"settings": BankSettings(size=64).model_dump(mode="json"), "patch_radius": 2.0, "cost": 0.125}
    tried = [trial(512, 0.91, None), trial(64, 0.905, None)]
    text = bank_section(bank | {"choice": {"why": "AUROC <0.905>", "tried": tried}})
    assert "AUROC &lt;0.905&gt;." in text and "12.5% of the encoder" in text and "<th>clusters kept" not in text
    rows = re.findall(r"<tr>(.*?)</tr>", text)
    assert rows[1].startswith("<td>512</td><td>0.910</td>") and "chosen" not in rows[1] and "<td>chosen</td>" in rows[2]
    assert rows[0].count("<th>") == 5  # size, which alone differs, and three figures
    kept = [trial(512, 0.91, 0.8), trial(64, 0.905, None)]
    assert "clusters kept from it" in bank_section(bank | {"choice": {"why": "so", "tried": kept}})
    assert "<table>" not in bank_section(bank)  # control: nothing was chosen


@pytest.mark.parametrize("shape", [(40, 50, 3), (40, 50, 1), (40, 50)])
def test_a_map_is_laid_over_colour_and_grey_pictures_alike(shape: tuple[int, ...]) -> None:
    picture = np.full(shape, 90, np.uint8)
    assert overlay(picture, np.ones((5, 6), np.float32)).shape == (40, 50, 3)
