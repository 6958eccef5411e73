"""A codebook made from a station's recent parts: what it must restore, what it must refuse, and what it must never learn."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from edge_dkm.calibration import calibrate
from edge_dkm.codebook import check_codebook
from edge_dkm.head import compute_head
from edge_dkm.recentring.checks import GoldenParts
from edge_dkm.recentring.kmeans import means, recentred
from edge_dkm.recentring.recentre import MIN_GROUPS, Options, Proposal, radii, recentre
from edge_dkm.recentring.refusal import RefusedError
from edge_dkm.recentring.reservoir import Rows
from edge_dkm.recentring.scoring import Space, nearest, raw_score
from edge_dkm.recentring.shares import deal

K, D, ALPHA = 3, 6, 0.05
SPACE = Space(K, D, l2=False)
OPTIONS = Options(ALPHA)
CENTRES = np.zeros((K, D), np.float32)
CENTRES[range(K), range(K)] = 12.0
GAIN = np.full(D, 0.45, np.float32)  # what a brighter lamp does to every embedding: about half a radius
DEFECT = np.array([0, 0, 0, 9, 0, 0], np.float32)

Codebook = dict[str, np.ndarray]


def parts(seed: int, n: int, shift: np.ndarray | float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (CENTRES[rng.integers(0, K, n)] + rng.normal(size=(n, D)) + shift).astype(np.float32)


def no_patches(z: np.ndarray) -> np.ndarray:
    return np.full(len(z), np.nan, np.float32)


def base() -> Codebook:
    """As the trainer leaves it for parts without drift."""
    z = parts(0, 6000)
    codebook = {"centroids": CENTRES, "cluster_mean": CENTRES, "cluster_radius": np.full(K, 2.2, np.float32)}
    _, s = raw_score(z, no_patches(z), codebook, False)
    return codebook | calibrate(s, np.arange(len(s)), ALPHA).tensors()


BASE = base()


def judged(z: np.ndarray, codebook: Codebook = BASE, patch: np.ndarray | None = None) -> Rows:
    """What a station keeps of parts that it judges one by one, each its own group."""
    n = len(z)
    patch = no_patches(z) if patch is None else patch
    ids, s = raw_score(z, patch, codebook, SPACE.l2)
    score = (s / codebook["novelty_scale"][0]).astype(np.float32)
    names = np.arange(n)
    return Rows(
        z,
        patch,
        ids,
        score,
        names.astype(np.uint64),
        score > 1,
        np.zeros(n, bool),
        names + 1,
        names,
        np.full(n, "base"),
    )


def flagged(z: np.ndarray, codebook: Codebook) -> float:
    return float(judged(z, codebook).is_novel.mean())


def refusal(rows: Rows, options: Options = OPTIONS, golden: GoldenParts | None = None) -> RefusedError:
    with pytest.raises(RefusedError) as caught:
        recentre(rows, BASE, SPACE, options, golden)
    return caught.value


@pytest.fixture(scope="module")
def drifted() -> Proposal:
    return recentre(judged(parts(1, 6000, GAIN)), BASE, SPACE, OPTIONS)


def test_after_a_drift_the_false_reject_rate_is_back_and_defects_are_still_caught(drifted: Proposal) -> None:
    new = parts(2, 20_000, GAIN)
    assert flagged(new, BASE) > 1.5 * ALPHA
    assert 0.6 * ALPHA < flagged(new, dict(drifted.tensors)) < 1.2 * ALPHA
    assert flagged(new + DEFECT, dict(drifted.tensors)) > 0.99


def test_centres_follow_the_parts_and_ids_keep_their_meaning(drifted: Proposal) -> None:
    assert np.abs(drifted.tensors["cluster_mean"] - CENTRES - GAIN).max() < 0.2
    assert nearest(CENTRES, drifted.tensors["centroids"]).tolist() == [0, 1, 2]
    assert drifted.figures["kept_clusters"] == [] and max(drifted.figures["moved_radii"]) < 1


def test_it_is_a_codebook_and_gives_the_graphs_own_answers(drifted: Proposal) -> None:
    check_codebook(drifted.tensors, K, D, "it")
    z = parts(3, 500, GAIN)
    outputs = compute_head(z, drifted.tensors, 1.0, l2=False)
    rows = judged(z, dict(drifted.tensors))
    assert np.array_equal(outputs["cluster_id"], rows.cluster)
    assert np.abs(outputs["novelty_score"] - rows.novelty_score).max() < 1e-4
    assert (outputs["p_value"][rows.novelty_score > 1.001] <= ALPHA).all()


def test_without_a_drift_little_changes() -> None:
    same = recentre(judged(parts(4, 6000)), BASE, SPACE, OPTIONS)
    assert max(same.figures["moved_radii"]) < 0.1
    assert 0.7 * ALPHA < flagged(parts(5, 20_000), dict(same.tensors)) < 1.3 * ALPHA


def with_defects(seed: int, share: float, shift: np.ndarray | float = 0.0) -> Rows:
    z = parts(seed, 6000, shift)
    z[: int(share * len(z))] += DEFECT
    return judged(np.random.default_rng(seed).permutation(z))


def test_defects_among_the_parts_are_left_out_of_centres_and_calibration() -> None:
    proposal = recentre(with_defects(6, 0.06), BASE, SPACE, OPTIONS)
    assert 0.06 <= proposal.figures["novel_share"] < 0.14
    assert flagged(parts(7, 5000) + DEFECT, dict(proposal.tensors)) > 0.99
    assert proposal.calibration.is_weaker_than_asked  # with that many above, 5 % cannot be proven


def test_control_with_the_novel_parts_let_in_it_learns_the_defect() -> None:
    rows = with_defects(6, 0.06)
    blind = recentre(replace(rows, is_novel=np.zeros(len(rows), bool)), BASE, SPACE, OPTIONS)
    assert flagged(parts(7, 5000) + DEFECT, dict(blind.tensors)) < 0.9


def test_more_than_three_times_the_target_is_refused_and_the_camera_named() -> None:
    error = refusal(judged(parts(8, 3000, 4 * GAIN)))
    assert (error.code, error.recommended) == ("too_many_novel", "camera")
    assert error.figures["novel_share"] > error.figures["excluded_limit"] == 0.15
    few = refusal(with_defects(9, 0.2))
    assert few.code == "too_many_novel"


def test_rejected_parts_count_as_left_out_too() -> None:
    rows = judged(parts(10, 3000))
    rejected = replace(rows, is_rejected=rows.cluster == 2)
    assert refusal(rejected).code == "too_many_novel"
    assert refusal(rows, replace(OPTIONS, rejected=frozenset({2}))).figures["rejected_share"] > 0.3


def test_a_cluster_without_parts_today_stays_as_it_was() -> None:
    z = parts(11, 6000, GAIN)
    rows = judged(z[nearest(z, CENTRES) != 1])
    proposal = recentre(rows, BASE, SPACE, OPTIONS)
    assert proposal.figures["kept_clusters"] == [1]
    for name in ("centroids", "cluster_mean", "cluster_radius"):
        assert np.array_equal(proposal.tensors[name][1], BASE[name][1])
        assert not np.array_equal(proposal.tensors[name][0], BASE[name][0])


def test_shots_of_one_part_count_once_in_the_share_and_stay_together() -> None:
    rows = judged(np.repeat(parts(12, 500), 4, axis=0))
    rows = replace(rows, group=np.repeat(np.arange(500), 4).astype(np.uint64))
    shares = deal(rows, np.random.default_rng(0))
    masks = [shares.centre, shares.radius, shares.calibration, shares.check]
    assert np.array_equal(np.sum(masks, 0), np.ones(2000)) and all((m[::4] == m[3::4]).all() for m in masks)
    assert [int(m.sum()) // 4 for m in masks] == [270, 45, 135, 50]
    assert shares.check[-200:].all()  # the newest
    assert 120 < recentre(rows, BASE, SPACE, OPTIONS).calibration.groups <= 135


def test_too_few_parts_are_refused_with_the_number_that_is_needed() -> None:
    error = refusal(judged(parts(13, MIN_GROUPS - 10)))
    assert (error.code, error.recommended) == ("too_few", "wait") and "71 to promise 5.00%" in error.detail
    assert refusal(judged(parts(13, 0))).code == "no_rows"


def test_a_share_without_a_good_part_is_refused_too() -> None:
    """With a target of 30 % most parts may be novel, and those that are dealt to the radii may all be."""
    rows = judged(parts(0, 200))
    dealt_to_radii = deal(rows, np.random.default_rng(OPTIONS.seed)).radius
    found = refusal(replace(rows, is_novel=dealt_to_radii), Options(0.3))
    assert found.code == "too_few" and found.recommended == "wait" and "no good part" in found.detail


def test_fewer_groups_than_the_rate_needs_promise_the_smallest_rate_they_can() -> None:
    proposal = recentre(judged(parts(14, 60)), BASE, SPACE, OPTIONS)
    assert proposal.calibration.is_weaker_than_asked and proposal.figures["promised_frr"] > ALPHA


def test_parts_that_are_all_the_same_are_refused() -> None:
    for kinds in (1, K):  # also where there are several kinds of parts, each always the same
        error = refusal(judged(np.tile(CENTRES[:kinds] + np.float32(0.5), (400, 1))))
        assert (error.code, error.recommended) == ("identical", "camera")


def test_by_group_the_strangest_shot_is_checked_too() -> None:
    z = np.repeat(parts(22, 1500), 3, axis=0) + np.random.default_rng(22).normal(scale=0.3, size=(4500, D))
    rows = judged(z.astype(np.float32))
    rows = replace(rows, group=np.repeat(np.arange(1500), 3).astype(np.uint64))
    strict = recentre(rows, BASE, SPACE, replace(OPTIONS, unit="group"))
    assert strict.figures["held_out"]["groups"] == 150 and strict.calibration.unit == "group"
    part = recentre(rows, BASE, SPACE, OPTIONS).figures["held_out"]
    assert strict.figures["held_out"]["before"] > part["before"]  # 15 parts have a novel shot, of 9 it is the first


def test_a_change_within_the_time_is_refused() -> None:
    error = refusal(judged(np.concatenate([parts(15, 5400), parts(16, 600, GAIN)])))
    assert (error.code, error.recommended) == ("false_rejects", "wait")
    held = error.figures["held_out"]
    assert held["flagged"] > held["high"] and held["groups"] == 600


def golden(shift: np.ndarray | float = 0.0) -> GoldenParts:
    z = CENTRES.repeat(8, axis=0) + np.random.default_rng(1).normal(scale=0.3, size=(8 * K, D)).astype(np.float32)
    return GoldenParts((z + shift).astype(np.float32), np.arange(K).repeat(8))


def test_golden_images_keep_their_cluster(drifted: Proposal) -> None:
    with_golden = recentre(judged(parts(1, 6000, GAIN)), BASE, SPACE, OPTIONS, golden())
    assert with_golden.figures["golden"] == {"compared": 24, "agreed": 24, "lost_clusters": []}
    assert np.array_equal(with_golden.tensors["centroids"], drifted.tensors["centroids"])


def test_control_golden_images_that_would_become_others_are_refused() -> None:
    good = golden()
    swapped = replace(good, ids=np.where(good.ids == 0, 1, good.ids))
    error = refusal(judged(parts(1, 6000)), golden=swapped)
    assert (error.code, error.recommended) == ("golden", "retrain")
    assert error.figures["golden"]["agreed"] == 16


def test_the_patch_score_joins_by_the_maximum() -> None:
    z = parts(17, 6000)
    patch = np.random.default_rng(17).gamma(4, 0.5, 6000).astype(np.float32)  # often the larger of the two
    codebook = dict(BASE)
    _, s = raw_score(z, patch, codebook, False)
    codebook |= calibrate(s, np.arange(len(s)), ALPHA).tensors()
    proposal = recentre(judged(z, codebook, patch), codebook, SPACE, OPTIONS)
    new, of_new = parts(18, 20_000), np.random.default_rng(18).gamma(4, 0.5, 20_000).astype(np.float32)
    rate = judged(new, dict(proposal.tensors), of_new).is_novel.mean()
    assert 0.3 * ALPHA < rate < 1.3 * ALPHA
    assert judged(new, dict(proposal.tensors)).is_novel.mean() < 0.7 * rate  # without patches it would be another edge


def test_after_an_l2_centroids_live_on_the_sphere_and_means_before_it() -> None:
    space = Space(K, D, l2=True)
    z = parts(19, 4000) * np.random.default_rng(19).uniform(0.8, 1.2, (4000, 1)).astype(np.float32)
    unit = z / np.linalg.norm(z, axis=1, keepdims=True)
    centroids = means(unit, nearest(z, CENTRES), CENTRES)
    codebook = {**BASE, "centroids": centroids}
    codebook["novelty_scale"] = np.array([2.5], np.float32)
    rows = replace(judged(z, codebook), cluster=nearest(unit, centroids))
    proposal = recentre(replace(rows, is_novel=np.zeros(4000, bool)), codebook, space, OPTIONS)
    assert (np.linalg.norm(proposal.tensors["centroids"], axis=1) < 1).all()
    assert np.linalg.norm(proposal.tensors["cluster_mean"], axis=1).min() > 10
    assert nearest(unit, proposal.tensors["centroids"]).tolist() == nearest(unit, centroids).tolist()


def test_mini_batches_end_where_the_means_are() -> None:
    z = parts(20, 3000, GAIN)
    centroids, ids = recentred(z, CENTRES, np.random.default_rng(0))
    assert np.abs(centroids - np.stack([z[ids == k].mean(0) for k in range(K)])).max() < 1e-4


def test_radii_are_the_trainers() -> None:
    torch = pytest.importorskip("torch")
    from trainer.novelty import radii as trainers_radii

    rng = np.random.default_rng(21)
    distance, ids = rng.gamma(3, 1, 200).astype(np.float32), rng.integers(0, K, 200)
    ids[:199][ids[:199] == 2] = 1
    ids[199] = 2  # one part alone: ten of the pooled ones outweigh it
    theirs = trainers_radii(torch.from_numpy(distance), torch.from_numpy(ids), K).numpy()
    assert np.allclose(radii(distance, ids, np.ones(K, np.float32)), theirs, rtol=1e-6)
