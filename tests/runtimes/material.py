"""The prepared folder: what runners read (manifest, raw frames, tensors) and the answers that come back. Raw little-endian files, for JavaScript too.

manifest.json               {"cases": [...]}, see Case
models/NAME.onnx            and its golden images and digest
frames/SIZE.bin             uint8, one frame after another
tensors/NAME-SET-TENSOR.bin float32
expected/NAME/OUTPUT.bin    answers of the newest onnxruntime, as a runner writes them
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.runtimes.runners.reading import outputs_of

ROWS = {"distances", "embedding", "novelty_map"}  # more than one number per frame
Answers = dict[str, NDArray[Any]]
Tensors = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Part:
    """`count` frames of one size in one file from `offset` bytes on, run `batch` at a time with an override set or none."""

    name: str
    frames: str
    offset: int
    count: int
    batch: int
    height: int
    width: int
    overrides: str | None = None


@dataclass(frozen=True)
class Case:
    """One model with everything that is asked of it. `control`: what is wrong on purpose; then the comparison must fail.

    `map_cells`: how many cells its novelty_map has, 0 without a bank.
    """

    name: str
    model: str
    resize: str
    precision: str
    tolerance: float
    n_clusters: int
    embed_dim: int
    l2: bool
    codebook: dict[str, Any]
    overrides: dict[str, dict[str, Any]]
    parts: list[Part] = field(default_factory=list)
    control: str | None = None
    map_cells: int = 0

    @property
    def frames(self) -> int:
        """How many answers a runner gives."""
        return sum(part.count for part in self.parts)


def write_manifest(folder: Path, cases: list[Case]) -> None:
    """Writes `manifest.json`."""
    text = json.dumps({"cases": [asdict(case) for case in cases]}, indent=1)
    (folder / "manifest.json").write_text(text, encoding="utf-8")


def read_manifest(folder: Path) -> list[Case]:
    """The cases of a prepared folder."""
    rows = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["cases"]
    return [Case(**{**row, "parts": [Part(**part) for part in row["parts"]]}) for row in rows]


def write_tensors(folder: Path, stem: str, tensors: Tensors) -> dict[str, Any]:
    """Writes one file per tensor; returns what the manifest says of them."""
    (folder / "tensors").mkdir(exist_ok=True)
    entries = {}
    for name, tensor in tensors.items():
        file = f"tensors/{stem}-{name}.bin"
        np.ascontiguousarray(tensor, "<f4").tofile(folder / file)
        entries[name] = {"file": file, "shape": list(tensor.shape)}
    return entries


def read_tensors(folder: Path, entries: Mapping[str, Any]) -> dict[str, NDArray[np.float32]]:
    """What `write_tensors` wrote."""
    return {name: np.fromfile(folder / e["file"], "<f4").reshape(e["shape"]) for name, e in entries.items()}


def read_answers(folder: Path, case: Case) -> Answers:
    """One runner's answers for a case, a row per frame.

    Raises:
        ValueError: a file with another number of values than the case has frames: a runner that stopped, or another graph.
    """
    answers: Answers = {}
    for name, dtype in outputs_of(case.map_cells).items():
        values = np.fromfile(folder / case.name / f"{name}.bin", dtype)
        width = {"distances": case.n_clusters, "embedding": case.embed_dim, "novelty_map": case.map_cells}.get(name, 1)
        if values.size != case.frames * width:
            raise ValueError(
                f"{folder / case.name}: {name} has {values.size} values, expected {case.frames} frames of {width}"
            )
        answers[name] = values.reshape(case.frames, width) if name in ROWS else values
    return answers
