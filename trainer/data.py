"""A set of images, decoded once into one uint8 tensor at the encoder's size. What cannot be read is listed, not fatal.

`load_dataset` takes what trainer/images.py found; fit, evaluate and predict call it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.errors import DataError
from trainer.images import BadImageError, DataSettings, Image, ImageSet, Item
from trainer.preprocess import Preprocess, PreprocessSettings, target_size


@dataclass(frozen=True)
class Skipped:
    """An image that could not be used, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Dataset:
    """All images of one set, decoded and brought to the encoder's size.

    `pixels`: (N, h, w, 3 or 1) uint8, BGR or grey (float32 with `resize: matmul`). `known`: (N,) index into `classes`, -1 where an
    image lies in no class folder; `labels`: the same where all are known, else None: what scores are computed from. `groups`: (N,)
    numbers; images of one group are never split. `good`: (N,) known or presumed good.
    """

    pixels: Tensor
    items: list[Item]
    known: NDArray[np.int64]
    classes: list[str]
    groups: NDArray[np.int64]
    good: NDArray[np.bool_]
    skipped: list[Skipped] = field(default_factory=list)
    manifest_sha256: str = ""
    roi: tuple[int, int, int, int] | None = None
    frame: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self.items)

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """Index into `classes` (N,) where every image has a class, else None."""
        return self.known if self.classes and bool((self.known >= 0).all()) else None

    @property
    def names(self) -> list[str]:
        """File names, relative to the set."""
        return [item.name for item in self.items]


def load_dataset(
    images: ImageSet,
    settings: DataSettings,
    preprocess: PreprocessSettings,
    progress: Callable[[Sequence[Item]], Iterator[Item]] = iter,
) -> tuple[Dataset, Preprocess]:
    """Decodes every image and brings it to the encoder's size.

    Returns:
        The data set, and the preprocessing module for that size (its mean and std are not fitted yet).

    Raises:
        DataError: no image is readable, the sizes do not fit the settings, or a down-scaling step would alias.
    """
    first = next((image for image in map(_try_read, images.items) if image is not None), None)
    if first is None:
        raise DataError(
            f"none of the {len(images.items)} images of {images.path} can be read; the first says: {_why(images.items[0])}"
        )
    try:
        height, width = target_size(preprocess, [first.shape[:2]])
    except ValueError as error:
        raise DataError(f"{images.path}: {error}") from None
    module = Preprocess(preprocess, height, width)
    decoded = _Decoded()
    for item in progress(images.items):
        try:
            image, sha256 = item.read()
        except BadImageError as error:
            decoded.skipped.append(Skipped(item.name, str(error)))
            continue
        decoded.sizes.add((image.shape[0], image.shape[1]))
        try:
            module.check_step(*image.shape[:2])
            target_size(preprocess, sorted(decoded.sizes))
        except ValueError as error:
            raise DataError(f"{item.name}: {error}") from None
        decoded.add(item, sha256, module.geometry(torch.from_numpy(image)[None])[0])
    return _assemble(images, settings, decoded), module


@dataclass
class _Decoded:
    """What `load_dataset` gathers while it reads."""

    rows: list[Tensor] = field(default_factory=list)
    items: list[Item] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    sizes: set[tuple[int, int]] = field(default_factory=set)
    first_by_digest: dict[str, str] = field(default_factory=dict)
    manifest: Any = field(default_factory=hashlib.sha256)

    def add(self, item: Item, sha256: str, row: Tensor) -> None:
        self.rows.append(row)
        self.items.append(item)
        # A byte-identical copy in another split would be calibrated on what was trained on.
        self.groups.append(self.first_by_digest.setdefault(sha256, item.group))
        self.manifest.update(f"{item.name}\0{sha256}\n".encode())


def _assemble(images: ImageSet, settings: DataSettings, decoded: _Decoded) -> Dataset:
    rows = decoded.rows
    if any(row.shape[-1] == 3 for row in rows):
        rows = [row.expand(-1, -1, 3) for row in rows]
    labels = [item.label for item in decoded.items]
    classes = sorted({label for label in labels if label is not None})
    index = {name: n for n, name in enumerate(classes)}
    known_good = has_known_good(classes, settings.good)
    group_ids = {group: n for n, group in enumerate(dict.fromkeys(decoded.groups))}
    common = next(iter(decoded.sizes)) if len(decoded.sizes) == 1 else None
    return Dataset(
        pixels=torch.stack(rows),
        items=decoded.items,
        known=np.array([-1 if label is None else index[label] for label in labels]),
        classes=classes,
        groups=np.array([group_ids[group] for group in decoded.groups]),
        good=np.array([_is_good(label, settings.good) if known_good else True for label in labels]),
        skipped=decoded.skipped,
        manifest_sha256=decoded.manifest.hexdigest(),
        roi=images.roi,
        frame=images.frame or ((common[1], common[0]) if common else None),
    )


def has_known_good(classes: list[str], good: str) -> bool:
    """Whether one of the class folders is that of known good parts."""
    return any(_is_good(name, good) for name in classes)


def _is_good(label: str | None, good: str) -> bool:
    return label is not None and Path(label).name.lower() == good.lower()


def _try_read(item: Item) -> Image | None:
    try:
        return item.read()[0]
    except BadImageError:
        return None


def _why(item: Item) -> str:
    try:
        item.read()
    except BadImageError as error:
        return f"{item.name}: {error}"
    return f"{item.name} is readable"
