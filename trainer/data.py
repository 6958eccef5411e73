"""A set of images, decoded once at the encoder's size, in memory or in a file. What cannot be read is listed, not fatal.

`load_dataset` takes what trainer/images.py found; fit, evaluate and predict call it. Besides the pixels, an image costs some 300 bytes
(name, group, reader), and 500 while the set is read; benchmarks/scale/memory.py measures them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.decoding import Reader, Skipped, decoded_images, digests
from trainer.errors import DataError
from trainer.images import DataSettings
from trainer.items import BadImageError, Image, ImageSet, Item
from trainer.pixel_place import NONE, Keeper, Reading, Record, StorePlace, read_record, why_disk, write_record
from trainer.preprocess import Preprocess, PreprocessSettings, target_size
from trainer.stored_pixels import Pixels, StoredPixels


@dataclass(frozen=True)
class Dataset:
    """All images of one set, decoded and brought to the encoder's size.

    `pixels`: (N, h, w, 3 or 1) uint8, BGR or grey (float32 with `resize: matmul`), a tensor or in a file. `known`: (N,) index into
    `classes`, -1 where an image lies in no class folder; `labels`: the same where all are known, else None: what scores are computed
    from. `groups`: (N,) numbers; images of one group are never split. `good`: (N,) known or presumed good.
    """

    pixels: Pixels
    items: Sequence[Item]
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
    progress: Reader = iter,
    place: StorePlace | None = None,
) -> tuple[Dataset, Preprocess]:
    """Decodes every image and brings it to the encoder's size; on disk if the settings or the memory at hand say so.

    Args:
        place: where on disk. What lies there already and is of the same images, byte for byte, is used instead of decoding.
            None: a temporary folder, which goes with the data set.

    Returns:
        The data set, and the preprocessing module for that size (its mean and std are not fitted yet).

    Raises:
        DataError: no image is readable, the sizes do not fit the settings, a down-scaling step would alias, or the disk is full.
    """
    if place is not None and (stored := _stored(images, settings, preprocess, progress, place)) is not None:
        return stored
    module = _module(images, preprocess)
    keeper = Keeper(settings, place, module, len(images.items))
    reading = Reading()
    try:
        for n, found in enumerate(decoded_images(images, module, settings.workers, progress)):
            reading.add(n, found)
            if found.pixels is not None:
                keeper.add(found.pixels)
        if not reading.close().positions:  # the first one could be read before
            raise nothing_readable(images)
        pixels = keeper.close()
        if place is not None and isinstance(pixels, StoredPixels):
            write_record(place, images, module, Record(reading, pixels))
    except BaseException:
        keeper.discard()
        raise
    return _assemble(images, settings, reading, _placed(pixels, settings, place)), module


def open_dataset(
    images: ImageSet, settings: DataSettings, preprocess: PreprocessSettings, place: StorePlace
) -> tuple[Dataset, Preprocess]:
    """What `load_dataset` of another process of this machine has put into `place`, which that one has compared with the images.

    Raises:
        DataError: there is none of this list of images and these settings.
    """
    found = read_record(place, images, lambda size: Preprocess(preprocess, *size))
    if found is None:
        raise DataError(
            f"{place.record} does not hold the pixels of the {len(images.items)} images of {images.path}; expected them of the first process "
            f"of this machine, with the same files and settings"
        )
    record, module = found
    return _assemble(images, settings, record.reading, _placed(record.pixels, settings, place)), module


def _stored(
    images: ImageSet, settings: DataSettings, preprocess: PreprocessSettings, progress: Reader, place: StorePlace
) -> tuple[Dataset, Preprocess] | None:
    """What lies in `place`, if it is of these images: their bytes are read and hashed again, not decoded."""
    found = read_record(place, images, lambda size: Preprocess(preprocess, *size))
    if found is None:
        return None
    record, module = found
    known = record.reading.digests()
    for n, sha256 in enumerate(digests(images.items, images, settings.workers, progress)):
        if (sha256 or NONE) != known[n].tobytes():
            place.say(
                f"{images.items[n].name} is not what it was when {record.pixels.path} was written; decoding again"
            )
            return None
    place.say(f"pixels are those in {record.pixels.path}: the images are the same")
    return _assemble(images, settings, record.reading, _placed(record.pixels, settings, place)), module


def _placed(pixels: Pixels, settings: DataSettings, place: StorePlace | None) -> Pixels:
    """Pixels that are on disk only to be shared by several processes, or because memory was short before, are brought into memory."""
    if not isinstance(pixels, StoredPixels) or place is None:
        return pixels
    needed = pixels.shape.numel() * pixels.dtype.itemsize
    return pixels[:] if why_disk(settings, needed, place) is None else pixels


def _module(images: ImageSet, preprocess: PreprocessSettings) -> Preprocess:
    first = next((image for image in map(_try_read, images.items) if image is not None), None)
    if first is None:
        raise nothing_readable(images)
    try:
        return Preprocess(preprocess, *target_size(preprocess, [first.shape[:2]]))
    except ValueError as error:
        raise DataError(f"{images.path}: {error}") from None


def nothing_readable(images: ImageSet) -> DataError:
    """The error for a set of which no image can be read."""
    return DataError(
        f"none of the {len(images.items)} images of {images.path} can be read; the first says: {_why(images.items[0])}"
    )


def _assemble(images: ImageSet, settings: DataSettings, reading: Reading, pixels: Pixels) -> Dataset:
    usable = reading.usable()
    items = images.items if len(usable) == len(images.items) else [images.items[n] for n in usable.tolist()]
    known, classes, good = truth_of([item.label for item in items], settings.good)
    common = reading.common_size
    return Dataset(
        pixels=pixels,
        items=items,
        known=known,
        classes=classes,
        groups=_groups(items, reading.digests()[usable]),
        good=good,
        skipped=reading.skipped,
        manifest_sha256=reading.manifest_sha256,
        roi=images.roi,
        frame=images.frame or ((common[1], common[0]) if common else None),
    )


def truth_of(labels: Sequence[str | None], good: str) -> tuple[NDArray[np.int64], list[str], NDArray[np.bool_]]:
    """What the class folders of N images say: `known`, `classes` and `good` of a Dataset."""
    classes = sorted({label for label in labels if label is not None})
    index: dict[str | None, int] = {name: n for n, name in enumerate(classes)}
    known = np.fromiter((index.get(label, -1) for label in labels), np.int64, len(labels))
    if not has_known_good(classes, good):
        return known, classes, np.ones(len(labels), np.bool_)
    # The last entry is what -1 finds: an image in no class folder is not known to be good.
    return known, classes, np.array([*(_is_good(name, good) for name in classes), False])[known]


def _groups(items: Sequence[Item], sha256: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Numbers (N,) of the groups, in the order in which they come.

    A byte-identical copy in another split would be calibrated on what was trained on: it is of the group of the first.
    """
    whole = np.ascontiguousarray(sha256).view(f"V{sha256.shape[1]}")[:, 0]
    _, first, inverse = np.unique(whole, return_index=True, return_inverse=True)
    numbers: dict[str, int] = {}
    owners = first[inverse]
    return np.fromiter((numbers.setdefault(items[n].group, len(numbers)) for n in owners), np.int64, len(items))


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
