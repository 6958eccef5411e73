"""The run's own images, read again where they were trained from: some for the quantiser's ranges, others to judge it by."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporters.errors import ExportError
from exporters.gate import HeldOut
from trainer.artifact import Run
from trainer.errors import DataError
from trainer.images import BadImageError, Item, open_images

Image = NDArray[np.uint8]
MAX_HELD_OUT = 2000
SEEN = "train"


@dataclass(frozen=True)
class OwnImages:
    """`ranges`: training images for the ranges of activations; `held_out`: what neither training nor the ranges have seen."""

    ranges: list[Image]
    held_out: list[HeldOut]


def read_own_images(run: Run, frame: tuple[int, int] | None, n_ranges: int) -> OwnImages:
    """At most `n_ranges` and MAX_HELD_OUT images, drawn by the run's seed; of the size `frame` (height, width) where it is fixed.

    Where all images were trained on (`novelty: none`) one half of them stands for held-out ones.

    Raises:
        ExportError: the images are not there any more, or too few have that size.
    """
    rows = _assignments(run)
    try:
        items = [item for item in open_images(run.settings.data).items if item.name in rows]
    except DataError as error:
        raise ExportError(f"int8 needs the images of the run, which cannot be read: {error}") from None
    rng = np.random.default_rng(run.settings.train.seed)
    items = [items[n] for n in rng.permutation(len(items))]
    seen = [item for item in items if rows[item.name]["split"] == SEEN]
    unseen = [item for item in items if rows[item.name]["split"] != SEEN]
    if not unseen:
        half = len(seen) // 2
        seen, unseen = seen[:half], seen[half:]
    groups = {group: n for n, group in enumerate(dict.fromkeys(item.group for item in unseen))}
    ranges = [image for _, image in _decoded(seen, frame, n_ranges)]
    held_out = [
        HeldOut(image, groups[item.group], rows[item.name]["split"] in {"radius", "calibration"})
        for item, image in _decoded(unseen, frame, MAX_HELD_OUT)
    ]
    if not ranges or not held_out:
        size = f" of {frame[1]}x{frame[0]}" if frame else ""
        raise ExportError(
            f"int8 needs training and held-out images{size}; of {len(rows)} images of the run {len(ranges)} and {len(held_out)} were found"
        )
    return OwnImages(ranges, held_out)


def _assignments(run: Run) -> dict[str, dict[str, Any]]:
    if run.path is None or not (run.path / "assignments.csv").is_file():
        raise ExportError(
            "int8 needs assignments.csv of the run folder, which says what was trained on; it is not there"
        )
    with (run.path / "assignments.csv").open(newline="", encoding="utf-8") as file:
        return {row["file"]: row for row in csv.DictReader(file)}


def _decoded(items: list[Item], frame: tuple[int, int] | None, limit: int) -> list[tuple[Item, Image]]:
    found: list[tuple[Item, Image]] = []
    for item in items:
        try:
            image = item.read()[0]
        except BadImageError:
            continue
        if frame is None or image.shape[:2] == frame:
            found.append((item, np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image))
        if len(found) == limit:
            break
    return found
