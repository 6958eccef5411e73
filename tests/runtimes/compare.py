"""The project's rule (edge_dkm/golden.py) on whole arrays of answers: which frames must agree, how far they are apart, what does not agree.

* ids: equal wherever the margin of the two nearest centroids exceeds twice the tolerance; elsewhere the id must be one of the near ones.
* novelty_score (where the id is the same), distance, distances: within the tolerance, relative to max(1, |value|).
* patch_score, novelty_map (of a model with a bank, where the id is the same): within the tolerance, relative to max(1, |value|).
* is_novel: equal wherever the score is further from the threshold than the tolerance.
* p_value: a step function of the score; it must lie between its values a tolerance above and below the expected score.
* nothing may be other than finite.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_dkm.golden import Golden
from tests.runtimes.material import Answers, Case, Tensors, read_answers, read_tensors
from tests.runtimes.runners.reading import PATCH_OUTPUTS

P_ROUNDING = 1e-5  # two sums of the same weights in float32


@dataclass(frozen=True)
class Comparison:
    """One case in one runtime. `problems` is empty where everything agrees; it names the first frame of each kind of difference."""

    case: Case
    frames: int
    ids_compared: int = 0
    ids_different: int = 0
    others_different: int = 0
    max_score_gap: float = 0.0
    max_distance_gap: float = 0.0
    problems: list[str] = field(default_factory=list)
    max_patch_gap: float = 0.0

    @property
    def agrees(self) -> bool:
        """Whether the runtime gives the expected answers."""
        return not self.problems


def compare_case(material: Path, answers: Path, case: Case) -> Comparison:
    """Compares what a runner left in `answers` with what is expected; a case that it could not run is a problem with its own words."""
    failed = answers / case.name / "error.txt"
    if failed.exists():
        return Comparison(case, 0, problems=[f"cannot run it: {_short(failed.read_text(encoding='utf-8'))}"])
    try:
        actual = read_answers(answers, case)
    except (OSError, ValueError) as error:
        return Comparison(case, 0, problems=[f"no answers: {error}"])
    expected = read_answers(material / "expected", case)
    return compare(case, expected, actual, thresholds(material, case), codebooks(material, case))


def compare(
    case: Case,
    expected: Answers,
    actual: Answers,
    threshold: NDArray[np.float32],
    codebook: list[tuple[slice, Tensors]],
) -> Comparison:
    """Compares answers, a row per frame; `threshold` per frame, `codebook` for the p values of a range of frames."""
    finite = np.ones(case.frames, bool)
    for values in actual.values():
        finite &= np.isfinite(values.astype(np.float64)).reshape(case.frames, -1).all(1)
    with np.errstate(invalid="ignore"):
        wrong_id, decisive, same = _ids(case, expected, actual)
        score_gap = np.where(same, _gap(actual["novelty_score"], expected["novelty_score"]), 0.0)
        distance_gap = np.maximum(
            _gap(actual["distances"], expected["distances"]).max(1), _gap(actual["distance"], expected["distance"])
        )
        patch_gap = {
            name: np.where(same, _worst(name, actual, expected), 0.0) for name in PATCH_OUTPUTS if name in expected
        }
        near = np.abs(expected["novelty_score"] - threshold) <= case.tolerance * np.maximum(1, threshold)
        wrong_edge = same & ~near & (actual["is_novel"] != expected["is_novel"])
        wrong_p = same & ~_p_is_right(case, expected, actual, codebook)
    kinds = {
        "a value that is not finite": ~finite,
        "another cluster": wrong_id,
        "another novelty_score": ~(score_gap <= case.tolerance),
        "other distances": ~(distance_gap <= case.tolerance),
        "another is_novel": wrong_edge,
        "another p_value": wrong_p,
        **{f"another {name}": ~(found <= case.tolerance) for name, found in patch_gap.items()},
    }
    problems = [_say(what, np.flatnonzero(bad), case, expected, actual) for what, bad in kinds.items() if bad.any()]
    return Comparison(
        case,
        case.frames,
        int(decisive.sum()),
        int(wrong_id.sum()),
        int((wrong_edge | wrong_p | ~finite).sum()),
        float(np.nanmax(score_gap, initial=0.0)),
        float(np.nanmax(distance_gap, initial=0.0)),
        problems,
        max((float(np.nanmax(found, initial=0.0)) for found in patch_gap.values()), default=0.0),
    )


def _ids(case: Case, expected: Answers, actual: Answers) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Per frame: a wrong id, whether the margin decides, the same id."""
    rule = Golden([], [], expected["distances"], expected["novelty_score"], {}, case.tolerance)
    decisive = np.array([rule.is_decisive(n) for n in range(case.frames)])
    wanted, got = expected["distances"].argmin(1), actual["cluster_id"]
    known = (got >= 0) & (got < case.n_clusters)
    chosen = np.take_along_axis(expected["distances"], np.where(known, got, 0)[:, None].astype(np.int64), 1)[:, 0]
    nearest = expected["distances"].min(1)
    also_near = known & (chosen - nearest <= 2 * case.tolerance * np.maximum(1, nearest))
    same = got == wanted
    return ~same & (decisive | ~also_near), decisive, same


def _worst(name: str, actual: Answers, expected: Answers) -> NDArray[np.float64]:
    """The largest gap of each frame."""
    return np.asarray(_gap(actual[name], expected[name]).reshape(len(expected[name]), -1).max(1))


def _gap(actual: NDArray[Any], expected: NDArray[Any]) -> NDArray[np.float64]:
    wanted = expected.astype(np.float64)
    return np.abs(actual.astype(np.float64) - wanted) / np.maximum(1.0, np.abs(wanted))


def _p_is_right(
    case: Case, expected: Answers, actual: Answers, codebook: list[tuple[slice, Tensors]]
) -> NDArray[np.bool_]:
    right = np.ones(case.frames, bool)
    for rows, tensors in codebook:
        score, scale = expected["novelty_score"][rows].astype(np.float64), float(tensors["novelty_scale"][0])
        room = case.tolerance * np.maximum(1, score)
        low, high = (_p_value(at * scale, tensors) for at in (score + room, score - room))
        p = actual["p_value"][rows]
        right[rows] = (p >= low - P_ROUNDING) & (p <= high + P_ROUNDING)
    return right


def _p_value(s: NDArray[np.float64], tensors: Tensors) -> NDArray[np.float64]:
    weight = tensors["calibration_weight"].astype(np.float64)
    above = (tensors["calibration"].astype(np.float64)[None] >= s[:, None]) @ weight
    return np.asarray((1 + above) / (1 + weight.sum()))


def thresholds(material: Path, case: Case) -> NDArray[np.float32]:
    """The novelty threshold of every frame."""
    values = []
    for part in case.parts:
        fed = read_tensors(material, case.overrides[part.overrides]) if part.overrides else {}
        values.append(np.full(part.count, fed.get("novelty_threshold", [1.0])[0], np.float32))
    return np.concatenate(values)


def codebooks(material: Path, case: Case) -> list[tuple[slice, Tensors]]:
    """The codebook of every range of frames."""
    base, start, found = read_tensors(material, case.codebook), 0, []
    for part in case.parts:
        fed = read_tensors(material, case.overrides[part.overrides]) if part.overrides else {}
        found.append((slice(start, start + part.count), {**base, **fed}))
        start += part.count
    return found


def _say(what: str, frames: NDArray[Any], case: Case, expected: Answers, actual: Answers) -> str:
    n = int(frames[0])
    start, place = 0, ""
    for part in case.parts:
        if start <= n < start + part.count:
            fed = f" with {part.overrides}" if part.overrides else ""
            place = f"{part.name} frame {n - start} of {part.width}x{part.height}{fed}"
            break
        start += part.count

    def told(answers: Answers) -> str:
        return (
            f"cluster {int(answers['cluster_id'][n])} at {float(answers['distance'][n]):.6g}, "
            f"score {float(answers['novelty_score'][n]):.6g}, p {float(answers['p_value'][n]):.4g}"
        )

    return f"{what} on {len(frames)} frames, first {place}: {told(actual)}; expected {told(expected)} +- {case.tolerance:g}"


def _short(text: str) -> str:
    """The last lines of a reader's report hold the reason."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if "must" in line or "not supported" in line or "failed for" in line] or lines
    return " | ".join(telling)[:300]
