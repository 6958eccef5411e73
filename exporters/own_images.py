"""The run's own images, read again where they were trained from: some for the quantiser's ranges, others to judge it by, and for drift's reference."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporters.errors import ExportError
from trainer.artifact import Run
from trainer.errors import DataError
from trainer.images import BadImageError, Item, open_images

Image = NDArray[np.uint8]
MIN_FOUND = 0.9  # of the run's images: with fewer the folder is another one
MIN_RANGES, MAX_RANGES = 100, 512  # below 300 the ranges of activations begin to be a matter of chance
MIN_HELD_OUT, MAX_HELD_OUT = 200, 2000  # with fewer, one image decides whether 99.5 % agree
SEEN = "train"
CALIBRATING = frozenset({"radius", "calibration"})


@dataclass(frozen=True)
class OwnImage:
    """One image, decoded when it is asked for. `group` and `is_good` as the run's calibration has them."""

    item: Item
    group: int
    is_good: bool

    def read(self) -> Image:
        """(H, W, 3) uint8 BGR."""
        image = self.item.read()[0]
        return np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image


@dataclass(frozen=True)
class OwnImages:
    """`ranges`: training images for the ranges of activations; `held_out`: what neither training nor the ranges have seen."""

    ranges: Sequence[OwnImage]
    held_out: Sequence[OwnImage]


def pixels_of(images: Sequence[OwnImage]) -> Iterator[Image]:
    """One after the other: thousands of camera frames do not fit into memory."""
    return (image.read() for image in images)


def find_own_images(run: Run, frame: tuple[int, int] | None) -> OwnImages:
    """At most MAX_RANGES and MAX_HELD_OUT images, drawn by the run's seed; of the size `frame` (height, width) where it is fixed.

    Where all images were trained on (`novelty: none`) one half of them stands for held-out ones.

    Raises:
        ExportError: the images are not there any more, or too few to say anything.
    """
    items, rows = _shuffled(run, "int8")
    seen = [item for item in items if rows[item.name]["split"] == SEEN]
    unseen = [item for item in items if rows[item.name]["split"] != SEEN]
    if all(row["split"] == SEEN for row in rows.values()):
        seen, unseen = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    ranges, held_out = _usable(seen, frame, MAX_RANGES), _usable(unseen, frame, MAX_HELD_OUT)
    for what, found, needed in (("training", ranges, MIN_RANGES), ("held-out", held_out, MIN_HELD_OUT)):
        if len(found) < needed:
            size = f" of {frame[1]}x{frame[0]}" if frame else ""
            raise ExportError(f"int8 needs {needed} {what} images{size} to be judged, the run has {len(found)}")
    return OwnImages([OwnImage(item, 0, False) for item in ranges], _grouped(held_out, rows))


def find_held_out_good(run: Run, frame: tuple[int, int] | None) -> list[OwnImage]:
    """At most MAX_HELD_OUT of the images that calibrated novelty or set its radii, as `find_own_images` draws them.

    Raises:
        ExportError: the images are not there any more, or all were trained on.
    """
    items, rows = _shuffled(run, "a reference for drift")
    good = _usable([item for item in items if rows[item.name]["split"] in CALIBRATING], frame, MAX_HELD_OUT)
    if not good:
        raise ExportError("a reference for drift needs held-out good images, and this run has none (novelty: none)")
    return _grouped(good, rows)


def _shuffled(run: Run, what: str) -> tuple[list[Item], dict[str, dict[str, Any]]]:
    """The run's images by its seed, and the rows of its assignments by name."""
    rows = _assignments(run, what)
    try:
        items = [item for item in open_images(run.settings.data).items if item.name in rows]
    except DataError as error:
        raise ExportError(f"{what} needs the images of the run, which cannot be read: {error}") from None
    if len(items) < MIN_FOUND * len(rows):
        raise ExportError(
            f"{what} needs the images of the run, but only {len(items)} of {len(rows)} are left in {run.settings.data.path}"
        )
    rng = np.random.default_rng(run.settings.train.seed)
    return [items[n] for n in rng.permutation(len(items))], rows


def _grouped(items: Sequence[Item], rows: dict[str, dict[str, Any]]) -> list[OwnImage]:
    groups = {group: n for n, group in enumerate(dict.fromkeys(item.group for item in items))}
    return [OwnImage(item, groups[item.group], rows[item.name]["split"] in CALIBRATING) for item in items]


def _assignments(run: Run, what: str) -> dict[str, dict[str, Any]]:
    if run.path is None or not (run.path / "assignments.csv").is_file():
        raise ExportError(
            f"{what} needs assignments.csv of the run folder, which says what was trained on; it is not there"
        )
    with (run.path / "assignments.csv").open(newline="", encoding="utf-8") as file:
        return {row["file"]: row for row in csv.DictReader(file)}


def _usable(items: Sequence[Item], frame: tuple[int, int] | None, limit: int) -> list[Item]:
    """The first `limit` that can be decoded and have the size of the graph."""
    found: list[Item] = []
    for item in items:
        try:
            size = item.read()[0].shape[:2]
        except BadImageError:
            continue
        if frame is None or size == frame:
            found.append(item)
        if len(found) == limit:
            break
    return found
