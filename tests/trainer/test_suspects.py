from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from trainer import load_run
from trainer.errors import ArtifactError
from trainer.images import open_images
from trainer.report import write_report
from trainer.suspects import (
    SuspectOptions,
    Suspects,
    folds_of,
    read_suspects,
    suspects,
    write_suspects,
)

D = 16
Vectors = NDArray[np.float32]


def good(rng: np.random.Generator, count: int, spread: float = 1.0) -> Vectors:
    return rng.normal(0, spread, (count, D)).astype(np.float32)


def with_strangers(seed: int, count: int = 300, strangers: int = 15, distance: float = 9.0) -> Vectors:
    """The last `strangers` rows lie that far out, each in a direction of its own."""
    rng = np.random.default_rng(seed)
    direction = rng.normal(0, 1, (strangers, D))
    far = distance * direction / np.linalg.norm(direction, axis=1, keepdims=True) + rng.normal(0, 1, (strangers, D))
    return np.concatenate([good(rng, count - strangers), far.astype(np.float32)])


@pytest.mark.parametrize("seed", range(4))
def test_strangers_are_named_first_and_hardly_anybody_else(seed: int) -> None:
    z = with_strangers(seed)
    found = suspects(z, np.arange(300))
    assert set(found.order[:15].tolist()) == set(range(285, 300)) and found.is_suspect.sum() <= 18
    assert found.problem is None and (np.diff(found.score[found.order]) <= 0).all()


@pytest.mark.parametrize("spread", [0.01, 1.0, 300.0])
def test_control_among_good_parts_hardly_anybody_is_named(spread: float) -> None:
    rng = np.random.default_rng(5)
    named = [int(suspects(good(rng, 300, spread), np.arange(300)).is_suspect.sum()) for _ in range(8)]
    assert sum(named) <= 8  # of 2,400


def test_strangers_that_resemble_each_other_do_not_hide_each_other() -> None:
    rng = np.random.default_rng(0)
    family = rng.normal(0, 0.5, (12, D)) + 3 * np.ones(D)
    z = np.concatenate([good(rng, 240), family.astype(np.float32)])
    found = suspects(z, np.arange(252), options=SuspectOptions(neighbours=15))
    assert found.is_suspect[240:].all() and found.is_suspect[:240].sum() <= 4


def test_parts_of_one_group_do_not_vouch_for_each_other() -> None:
    """A defective part that was photographed ten times is a suspect in each of its pictures."""
    rng = np.random.default_rng(0)
    shots = rng.normal(0, 0.05, (10, D)) + 3 * np.ones(D)
    z = np.concatenate([good(rng, 200), shots.astype(np.float32)])
    apart = np.arange(210)
    together = np.concatenate([np.arange(200), np.full(10, 500)])
    assert suspects(z, together).is_suspect[200:].all()
    assert not suspects(z, apart, options=SuspectOptions(rounds=1)).is_suspect[200:].any()  # control: they did


def test_a_wide_cluster_is_not_suspect_as_a_whole() -> None:
    rng = np.random.default_rng(0)
    z = np.concatenate([good(rng, 270), good(rng, 30, 3.0) + 100])
    clusters = np.repeat([0, 1], [270, 30])
    assert suspects(z, np.arange(300), clusters).is_suspect.sum() <= 3
    assert suspects(z, np.arange(300)).is_suspect[270:].sum() > 25  # control: without its clusters it is


def test_p_values_are_those_of_the_normal_law_for_lognormal_scores() -> None:
    from trainer.suspects import _judged

    log_s = np.random.default_rng(0).normal(2.0, 0.3, 20_000)
    score, p_value = _judged(np.exp(log_s), np.arange(20_000), np.zeros(20_000, np.int64))
    for level in (0.5, 0.1, 0.01):
        assert (p_value <= level).mean() == pytest.approx(level, rel=0.15)
    assert score[np.argsort(log_s)[10_000]] == pytest.approx(1.0, abs=0.01)


def test_of_four_p_values_those_below_their_step_are_rejected() -> None:
    from trainer.suspects import _rejected

    # Steps at level .2: .05, .1, .15, .2; .12 lies below the third step, so all up to it go, also .11 above the second.
    assert _rejected(np.array([0.12, 0.9, 0.01, 0.11]), 0.2).tolist() == [True, False, True, True]
    assert not _rejected(np.array([0.06, 0.9, 0.9, 0.9]), 0.2).any()


def test_folds_keep_groups_whole_and_are_about_equal() -> None:
    groups = np.repeat(np.arange(50), 3)
    fold = folds_of(groups, SuspectOptions())
    assert all(len(set(fold[groups == g].tolist())) == 1 for g in range(50))
    assert np.bincount(fold).tolist() == [30] * 5


def test_same_input_same_answer_and_order_changes_nothing_else() -> None:
    z = with_strangers(1)
    found, again = suspects(z, np.arange(300)), suspects(z.copy(), np.arange(300))
    assert np.array_equal(found.p_value, again.p_value)


@pytest.mark.parametrize(
    ("z", "groups", "text"),
    [
        (np.ones((10, 2), np.float32), np.arange(10), "10 training images of 10 groups are too few"),
        (np.ones((100, 2), np.float32), np.zeros(100, int), "100 training images of 1 groups are too few"),
        (np.ones((100, 2), np.float32), np.arange(100), "more than half of the images are alike"),
        (np.full((100, 2), np.nan, np.float32), np.arange(100), "an embedding is not finite"),
    ],
)
def test_where_nothing_can_be_said_nobody_is_named(z: Vectors, groups: NDArray[np.int64], text: str) -> None:
    found = suspects(z, groups)
    assert found.problem is not None and text in found.problem and not found.is_suspect.any()


def test_the_report_shows_suspects_with_their_pictures(copied_run: Path) -> None:
    run = load_run(copied_run)
    page = copied_run / "report.html"
    assert "Suspects among" not in page.read_text() or (copied_run / "suspects.csv").exists()
    names = [item.name for item in open_images(run.settings.data).items]
    is_suspect = np.isin(np.arange(len(names)), [3, 7])
    p = np.where(is_suspect, 1e-5, 0.5)
    write_suspects(copied_run, names, Suspects(np.arange(len(names)) / 2, p, is_suspect, 0.1))
    assert read_suspects(copied_run) == [(names[7], 3.5, 1e-5), (names[3], 1.5, 1e-5)]
    write_report(run, None, page)
    section = page.read_text().split("<h2>Suspects among the training images</h2>")[1].split("<h2>")[0]
    assert section.count("data:image/jpeg") == 2 and "2 training images" in section and "3.50, p 1e-05" in section


def test_a_run_without_suspects_says_so_and_an_old_run_says_nothing(copied_run: Path) -> None:
    run, page = load_run(copied_run), copied_run / "report.html"
    none = np.zeros(3, bool)
    write_suspects(copied_run, ["a", "b", "c"], Suspects(np.ones(3), np.ones(3), none, 0.1))
    write_report(run, None, page)
    assert "None: no training image is farther" in page.read_text()
    (copied_run / "suspects.csv").unlink()
    write_report(run, None, page)
    assert "Suspects among" not in page.read_text() and read_suspects(copied_run) is None


def test_where_nothing_could_be_said_the_report_does_not_say_that_there_are_none(copied_run: Path) -> None:
    found = suspects(np.ones((10, 2), np.float32), np.arange(10))
    (copied_run / "suspects.csv").write_text("file,score,p_value\n")  # of an attempt before
    write_suspects(copied_run, [str(n) for n in range(10)], found)
    assert found.problem is not None and read_suspects(copied_run) is None
    write_report(load_run(copied_run), None, copied_run / "report.html")
    assert "Suspects among" not in (copied_run / "report.html").read_text()


@pytest.mark.parametrize("damage", ["file,score\na,b\n", "file,score,p_value\na," + "1" * 200_000 + ",1\n"])
def test_a_damaged_list_is_an_error_that_names_the_file(copied_run: Path, damage: str) -> None:
    (copied_run / "suspects.csv").write_text(damage)
    with pytest.raises(ArtifactError, match=r"suspects\.csv cannot be read"):
        read_suspects(copied_run)
