"""What a run says of every image of a set: read and embedded piece by piece, each process its share of the images.

Memory holds one piece of pixels, and some numbers per image; a million images are no other case than a hundred.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from trainer import ranks
from trainer.artifact import Run
from trainer.data import Dataset, load_dataset, nothing_readable
from trainer.decoding import Reader, batches_of, workers_of
from trainer.images import DataSettings, ImageSet, open_images

PIECE = 1024  # images whose pixels are held at once


@dataclass(frozen=True)
class Answers:
    """Of the readable images, in the set's order: `names` and `labels` (class folder or None) as lists, and arrays (N,).

    `skipped` could not be read.
    """

    names: list[str]
    labels: list[str | None]
    ids: NDArray[np.int64]
    distances: NDArray[np.float32]
    scores: NDArray[np.float32]
    skipped: int


def read_like(run: Run, path: str, progress: Reader = iter) -> Dataset:
    """A set of images, brought to this run's input, as a whole."""
    source = _source(run, path)
    size = {"height_px": run.model.preprocess.height_px, "width_px": run.model.preprocess.width_px}
    return load_dataset(open_images(source), source, run.settings.preprocess.model_copy(update=size), progress)[0]


def answers(run: Run, path: str, progress: Reader = iter) -> Answers:
    """Asks the run about the images at `path`; every process gets the answers of all.

    Raises:
        DataError: none of them can be read.
    """
    images, together = open_images(_source(run, path)), ranks.current()
    own = range(together.index, len(images.items), together.count)
    workers = max(1, workers_of(images, None) // together.local_count)
    with ranks.alone():
        pieces = list(_pieces(run, replace(images, items=[images.items[n] for n in own]), workers, progress))
    found = together.gather((list(own), pieces))
    order = np.array([own[n] for own, pieces in found for piece in pieces for n in piece.places], np.int64)
    if not len(order):
        raise nothing_readable(images)
    place = np.argsort(order)
    every = [piece for _, pieces in found for piece in pieces]
    names = [name for piece in every for name in piece.names]
    labels = [label for piece in every for label in piece.labels]
    ids, distances, scores = (
        np.concatenate(column)[place] for column in zip(*(piece.columns for piece in every), strict=True)
    )
    return Answers(
        [names[n] for n in place], [labels[n] for n in place], ids, distances, scores, len(images.items) - len(order)
    )


@dataclass(frozen=True)
class _Piece:
    """`places` of its readable images among this process's own."""

    places: list[int]
    names: list[str]
    labels: list[str | None]
    columns: tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]


def _pieces(run: Run, images: ImageSet, workers: int, progress: Reader) -> Iterator[_Piece]:
    for batch in batches_of(images, run.model.preprocess, PIECE, workers, progress):
        if not batch.positions:
            continue
        seen = run.model.see(batch.pixels)
        ids, distances = run.model.assign(seen.z)
        columns = (ids.cpu().numpy(), distances.cpu().numpy(), run.model.novelty_scores(seen).cpu().numpy())
        items = [images.items[n] for n in batch.positions]
        yield _Piece(batch.positions, [item.name for item in items], [item.label for item in items], columns)


def _source(run: Run, path: str) -> DataSettings:
    changes = {
        "groups": None, "limit": None, "classes": None, "split": "all", "every": 1, "path": path, "kind": "auto",
        "workers": None, "memory": "auto", "scratch": None,
    }  # fmt: skip
    return run.settings.data.model_copy(update=changes)
