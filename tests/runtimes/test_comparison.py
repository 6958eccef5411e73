from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest

from tests.runtimes.__main__ import main, prove
from tests.runtimes.compare import Comparison, compare, compare_case
from tests.runtimes.further import SIZES, further_frames, make_frame
from tests.runtimes.material import Answers, Case, Part, read_answers, read_manifest
from tests.runtimes.prepare import prepare
from tests.runtimes.report import Line
from tests.runtimes.runners.head import head
from tests.runtimes.runtime import NotRunError, Runtime, ask, runtimes

# Two centroids 10 apart on a line, four frames: near 0, near 1, a tolerance from the middle, exactly on centroid 0.
CASE = Case(
    "hand",
    "",
    "none",
    "fp32",
    0.01,
    2,
    1,
    False,
    {},
    {},
    [Part("golden", "", 0, 3, 1, 1, 1), Part("further", "", 0, 1, 1, 1, 1)],
)
CODEBOOK = {
    "centroids": np.array([[0.0], [10.0]], np.float32),
    "cluster_mean": np.array([[0.0], [10.0]], np.float32),
    "cluster_radius": np.array([1.0, 2.0], np.float32),
    "novelty_scale": np.array([2.0], np.float32),
    "calibration": np.array([0.5, 1.5], np.float32),
    "calibration_weight": np.array([1.0, 1.0], np.float32),
}
EMBEDDING = np.array([[1.0], [8.0], [5.001], [0.0]], np.float32)


def expected() -> Answers:
    return head(EMBEDDING, {**CODEBOOK, "novelty_threshold": np.ones(1, np.float32)}, l2=False)


def judged(**changes: tuple[int, float]) -> Comparison:
    """The expected answers with one value of an output changed."""
    actual = {name: np.array(value, copy=True) for name, value in expected().items()}
    for name, (n, value) in changes.items():
        actual[name].reshape(len(EMBEDDING), -1)[n, 0] = value
    return compare(CASE, expected(), actual, np.ones(4, np.float32), [(slice(0, 4), CODEBOOK)])


def test_the_head_outside_the_graph_gives_the_values_of_the_definition() -> None:
    out = expected()
    assert out["cluster_id"].tolist() == [0, 1, 1, 0]
    assert out["distance"] == pytest.approx([1, 2, 4.999, 0], abs=1e-5)
    assert out["novelty_score"] == pytest.approx([0.5, 0.5, 4.999 / 4, 0], abs=1e-5)  # distance / radius / scale
    assert out["p_value"] == pytest.approx([2 / 3, 2 / 3, 1 / 3, 1])  # raw 1, 1, 2.4995, 0 against 0.5 and 1.5
    assert out["is_novel"].tolist() == [False, False, True, False]


def test_equal_answers_agree_and_ids_are_compared_only_where_the_margin_decides() -> None:
    same = judged()
    assert same.agrees and (same.frames, same.ids_compared, same.max_score_gap) == (4, 3, 0.0)
    assert judged(cluster_id=(2, 0)).agrees  # frame 2 lies between both centroids: either is right


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cluster_id": (0, 1)}, "another cluster on 1 frames, first golden frame 0 of 1x1: cluster 1 at 1"),
        ({"cluster_id": (3, -1)}, "another cluster on 1 frames, first further frame 0"),
        ({"cluster_id": (2, 7)}, "another cluster"),
        ({"novelty_score": (1, 0.511)}, "another novelty_score .* score 0.511.*expected .* score 0.5.* 0.01"),
        ({"distance": (1, 2.03)}, "other distances"),
        ({"distances": (1, 8.1)}, "other distances"),
        ({"is_novel": (0, 1)}, "another is_novel"),
        ({"p_value": (0, 1 / 3)}, "another p_value"),
        ({"embedding": (0, np.nan)}, "not finite"),
        ({"novelty_score": (0, np.nan)}, "not finite"),
        ({"distances": (0, np.inf)}, "not finite"),
    ],
)
def test_control_every_kind_of_difference_is_found(changes: dict[str, tuple[int, float]], words: str) -> None:
    found = judged(**changes)
    assert not found.agrees
    assert re.search(words, " | ".join(found.problems))


def judged_patches(**changes: tuple[int, float]) -> Comparison:
    """As `judged`, of a model whose bank found frame 1 strange: a map of two cells."""
    case, patch_score = dataclasses.replace(CASE, map_cells=2), np.array([0.5, 3.0, 0.5, 0.5], np.float32)
    codebook = {**CODEBOOK, "novelty_threshold": np.ones(1, np.float32)}
    answers = head(EMBEDDING, codebook, False, patch_score)
    answers |= {"patch_score": patch_score, "novelty_map": np.stack([patch_score, patch_score / 2], 1)}
    actual = {name: np.array(value, copy=True) for name, value in answers.items()}
    for name, (n, value) in changes.items():
        actual[name].reshape(len(EMBEDDING), -1)[n, -1] = value
    return compare(case, answers, actual, np.ones(4, np.float32), [(slice(0, 4), CODEBOOK)])


def test_patches_join_the_score_by_a_maximum_and_are_compared() -> None:
    codebook = {**CODEBOOK, "novelty_threshold": np.ones(1, np.float32)}
    out = head(EMBEDDING, codebook, False, np.array([0.5, 3.0, 0.5, 0.5], np.float32))
    assert out["novelty_score"] == pytest.approx([0.5, 1.5, 4.999 / 4, 0.25], abs=1e-5)
    same = judged_patches()
    assert same.agrees and same.max_patch_gap == 0.0
    near = judged_patches(patch_score=(1, 3.02), novelty_map=(2, 0.255))
    assert near.agrees and near.max_patch_gap == pytest.approx(0.02 / 3, rel=1e-3)
    assert judged_patches(novelty_map=(0, 0.4), cluster_id=(0, 0)).problems[0].startswith("another novelty_map on 1 ")
    assert judged_patches(patch_score=(1, 3.1)).problems[0].startswith("another patch_score on 1 frames")
    assert judged_patches(novelty_map=(3, np.nan)).problems[0].startswith("a value that is not finite")
    assert judged_patches(novelty_map=(2, 0.9), cluster_id=(2, 0)).agrees  # per cluster, another id has another map


@pytest.mark.parametrize("changes", [{"novelty_score": (1, 0.509)}, {"distance": (1, 2.019)}, {"distances": (1, 8.07)}])
def test_what_lies_within_the_tolerance_agrees(changes: dict[str, tuple[int, float]]) -> None:
    assert judged(**changes).agrees


def test_a_p_value_may_fall_on_either_side_of_a_step_that_the_score_all_but_touches() -> None:
    touching = {**CODEBOOK, "calibration": np.array([0.5, 1.0], np.float32)}  # frame 0 has the raw score 1.0
    actual = {name: np.array(value, copy=True) for name, value in expected().items()}
    ones = np.ones(4, np.float32)
    actual["p_value"][:] = (1 / 3, 2 / 3, 1 / 3, 1)
    assert not compare(CASE, expected(), actual, ones, [(slice(0, 4), CODEBOOK)]).agrees
    assert compare(CASE, expected(), actual, ones, [(slice(0, 4), touching)]).agrees


def test_the_further_frames_are_the_same_every_time_and_hold_black_white_and_every_size() -> None:
    frames = [(size, frame) for size, group in further_frames(400, SIZES) for frame in group]
    assert len(frames) == 400 and all(frame.shape == (*size, 3) and frame.dtype == np.uint8 for size, frame in frames)
    assert {size for size, _ in frames} == set(SIZES)
    means = [frame.mean() for _, frame in frames]
    assert 0.0 in means and 255.0 in means and len(set(means)) > 350
    assert np.array_equal(make_frame(17, (32, 32)), make_frame(17, (32, 32)))


@pytest.fixture(scope="module")
def material(tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("material")
    prepare(folder, [tiny_model_path], further=40)
    return folder


def test_the_newest_onnxruntime_gives_the_expected_answers_and_the_controls_are_seen(material: Path) -> None:
    lines, not_run = prove(material, [runtimes(material)["newest"]])
    assert not_run == {} and [line.verdict for line in lines] == [
        "same",
        "seen: one weight nudged",
        "seen: red and blue exchanged",
    ]
    assert lines[0].comparison.ids_compared > 40 and lines[0].comparison.max_score_gap < 1e-6
    assert main([str(material), "--only", "newest"]) == 0


def test_a_model_with_a_bank_is_asked_for_its_patches_too(bank_model_path: Path, tmp_path: Path) -> None:
    prepare(tmp_path, [bank_model_path], further=20)
    case = read_manifest(tmp_path)[0]
    assert case.map_cells == 12 * 12
    answers = read_answers(tmp_path / "expected", case)
    assert answers["novelty_map"].shape == (case.frames, 144) and answers["patch_score"].shape == (case.frames,)
    assert answers["patch_score"] == pytest.approx(answers["novelty_map"].max(1), rel=1e-6)
    lines, not_run = prove(tmp_path, [runtimes(tmp_path)["newest"]])
    assert not_run == {} and lines[0].verdict == "same" and lines[0].comparison.max_patch_gap < 1e-6


def test_the_override_sets_change_answers_and_zero_distance_is_among_them(material: Path) -> None:
    case = read_manifest(material)[0]
    answers, start, rows = read_answers(material / "expected", case), 0, {}
    for part in case.parts:
        rows.setdefault(part.overrides, start)
        start += part.count
    assert set(rows) == {None, "threshold", "codebook", "on_centroid"}
    base, moved, placed = (rows[name] for name in (None, "codebook", "on_centroid"))
    assert answers["novelty_score"][moved] != pytest.approx(answers["novelty_score"][base], rel=1e-3)
    assert (answers["cluster_id"][placed], answers["distance"][placed], answers["novelty_score"][placed]) == (0, 0, 0)


def test_a_runtime_that_is_not_there_is_said_and_fails_unless_allowed(
    material: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(material), "--environments", str(material / "none"), "--only", "newest", "openvino"]
    assert main(command) == 1
    assert "NOT RUN: openvino: " in capsys.readouterr().out
    assert main([*command, "--allow-missing", "openvino"]) == 0
    assert "runtimes not run: openvino" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([str(material), "--only", "opnvino"])


def test_a_runner_that_fails_is_not_run_with_its_own_words(material: Path, tmp_path: Path) -> None:
    known = runtimes(material)["newest"]
    broken = Runtime("broken", (*known.program, "no-such-folder"))
    with pytest.raises(NotRunError, match=r"(?s)exit code 1.*no-such-folder"):
        ask(broken, material, tmp_path)


def test_a_case_that_a_runtime_cannot_read_or_leaves_half_done_is_a_problem(material: Path, tmp_path: Path) -> None:
    case = read_manifest(material)[0]
    assert "no answers" in compare_case(material, tmp_path, case).problems[0]
    (tmp_path / case.name).mkdir()
    (tmp_path / case.name / "error.txt").write_text("long report\nConversion is failed for: Fancy-18\n")
    assert compare_case(material, tmp_path, case).problems == ["cannot run it: Conversion is failed for: Fancy-18"]


def test_a_known_limit_is_strict() -> None:
    limited = Runtime("limited", (), limits=(("none", "it rounds"),))
    about = {"runtime": "limited", "version": "1"}
    other = dataclasses.replace(CASE, resize="matmul")
    assert Line(limited, about, judged(distance=(1, 3.0))).verdict == "differs, known"
    assert not Line(limited, about, judged()).is_right  # it agrees now: the limit has to go
    assert not Line(limited, about, dataclasses.replace(judged(distance=(1, 3.0)), case=other)).is_right


def test_a_control_that_was_not_run_proves_nothing() -> None:
    control = dataclasses.replace(CASE, control="one weight nudged")
    runtime, about = Runtime("any", ()), {"runtime": "any", "version": "1"}
    seen = dataclasses.replace(judged(distance=(1, 3.0)), case=control)
    assert Line(runtime, about, seen).is_right
    assert not Line(runtime, about, dataclasses.replace(judged(), case=control)).is_right
    assert not Line(runtime, about, Comparison(control, 0, problems=["cannot run it"])).is_right
