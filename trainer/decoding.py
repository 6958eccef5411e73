"""Reads images by several threads, in order, with a bounded number on the way: OpenCV, zlib and hashlib work outside Python's lock.

Bytes on the way at any time: at most (2 workers + 1) x (CHUNK_BYTES or one image at the encoder's size), and per worker TOGETHER_BYTES or
two decoded frames, and what resizing them takes.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor

from trainer.errors import DataError
from trainer.items import BadImageError, Image, ImageSet, Item
from trainer.preprocess import Preprocess, target_size

T = TypeVar("T")
R = TypeVar("R")
CHUNK_BYTES = 1 << 22
MOST_IN_CHUNK = 64
TOGETHER_BYTES = 1 << 20  # of frames that are resized at once: eight times as much while they are
Reader = Callable[[Sequence[Item]], Iterator[Item]]


@dataclass(frozen=True)
class Skipped:
    """An image that could not be used, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Decoded:
    """One image as it was read: `pixels` (h, w, 3 or 1) at the encoder's size, or why there are none; `size` (height, width) of the frame.

    `sha256`: 32 bytes, of its bytes; empty where those cannot be had.
    """

    item: Item
    sha256: bytes
    size: tuple[int, int]
    pixels: Tensor | None
    reason: str = ""


@dataclass(frozen=True)
class Batch:
    """Some images of a set in order: `positions` in its items and pixels (B, h, w, 3 or 1) of the readable ones, and the others."""

    positions: list[int]
    pixels: Tensor
    skipped: list[Skipped]


def workers_of(images: ImageSet, wanted: int | None) -> int:
    """Threads that read: as wanted, else one for each core that this process may use; one where images come in order only."""
    if images.is_sequential:
        return 1
    return wanted or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def batches_of(
    images: ImageSet, module: Preprocess, batch: int, workers: int | None = None, progress: Reader = iter
) -> Iterator[Batch]:
    """The images of a set, `batch` at a time, each read once and held no longer than its batch: what `predict` needs of millions of them.

    A batch whose last images are unreadable is a shorter one; it may be empty.

    Raises:
        DataError: the sizes do not fit the settings, or a down-scaling step would alias.
    """
    positions: list[int] = []
    rows: list[Tensor] = []
    skipped: list[Skipped] = []
    for n, found in enumerate(decoded_images(images, module, workers, progress)):
        if found.pixels is None:
            skipped.append(Skipped(found.item.name, found.reason))
        else:
            positions.append(n)
            rows.append(found.pixels)
        if len(rows) + len(skipped) == batch:
            yield Batch(positions, _stacked(rows, module), skipped)
            positions, rows, skipped = [], [], []
    if rows or skipped:
        yield Batch(positions, _stacked(rows, module), skipped)


def _stacked(rows: list[Tensor], module: Preprocess) -> Tensor:
    if not rows:
        return torch.zeros(0, module.height_px, module.width_px, 1, dtype=module.stored_dtype)
    if any(row.shape[-1] == 3 for row in rows):
        rows = [row.expand(-1, -1, 3) for row in rows]
    return torch.stack(rows)


def decoded_images(
    images: ImageSet, module: Preprocess, workers: int | None = None, progress: Reader = iter
) -> Iterator[Decoded]:
    """Every image of a set, in its order, whoever read it.

    Raises:
        DataError: as `batches_of`; it names the image.
    """

    def read(items: list[Item]) -> list[Decoded]:
        return _decode(items, module)

    size_px = module.height_px * module.width_px * 3 * module.stored_dtype.itemsize
    expected = module.settings.model_copy(update={"height_px": module.height_px, "width_px": module.width_px})
    seen: set[tuple[int, int]] = set()
    for found in in_order(read, progress(images.items), workers_of(images, workers), max(1, CHUNK_BYTES // size_px)):
        if found.pixels is not None and found.size not in seen:
            seen.add(found.size)
            try:
                module.check_step(*found.size)
                target_size(expected, sorted(seen))
            except ValueError as error:
                raise DataError(f"{found.item.name}: {error}") from None
        yield found


def digests(items: Sequence[Item], images: ImageSet, workers: int | None, progress: Reader = iter) -> Iterator[bytes]:
    """sha256 of each item's bytes (32 bytes; empty where they cannot be had), in order; image files are not decoded."""

    def digest(some: list[Item]) -> list[bytes]:
        return [bytes.fromhex(item.digest() or "") for item in some]

    return in_order(digest, progress(items), workers_of(images, workers), MOST_IN_CHUNK)


def _decode(items: list[Item], module: Preprocess) -> list[Decoded]:
    """Some images, in order. Small ones of one size are resized together: one by one, most of the time would be Python's."""
    found: list[Decoded] = []
    alike: list[tuple[Item, str, Image]] = []
    for item in items:
        try:
            image, sha256 = item.read()
        except BadImageError as error:
            found += [
                *_resized(alike, module),
                Decoded(item, bytes.fromhex(item.digest() or ""), (0, 0), None, str(error)),
            ]
            alike = []
            continue
        if alike and (image.shape != alike[0][2].shape or (len(alike) + 1) * image.nbytes > TOGETHER_BYTES):
            found += _resized(alike, module)
            alike = []
        alike.append((item, sha256, image))
    return found + _resized(alike, module)


def _resized(alike: list[tuple[Item, str, Image]], module: Preprocess) -> list[Decoded]:
    """Images of one shape at the encoder's size."""
    if not alike:
        return []
    frames = [torch.from_numpy(image) for _, _, image in alike]
    if module.stored_dtype.is_floating_point:  # its last digit may depend on how many are multiplied at once
        rows = [module.geometry(frame[None])[0] for frame in frames]
    else:
        rows = list(module.geometry(torch.stack(frames) if len(frames) > 1 else frames[0][None]))
    return [
        Decoded(item, bytes.fromhex(sha256), (image.shape[0], image.shape[1]), row)
        for (item, sha256, image), row in zip(alike, rows, strict=True)
    ]


def in_order(work: Callable[[list[T]], list[R]], items: Iterable[T], workers: int, chunk: int) -> Iterator[R]:
    """`work` of every item, some at a time, by so many threads; in the order of the items. At most 2 workers + 1 chunks are on the way or wait."""
    chunk = min(chunk, MOST_IN_CHUNK)
    source = iter(items)
    pool = _started(workers)
    waiting: deque[Future[list[R]]] = deque()
    try:
        while True:
            while len(waiting) < 2 * workers and (part := list(islice(source, chunk))):
                waiting.append(pool.submit(work, part))
            if not waiting:
                return
            yield from waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _started(workers: int) -> ThreadPoolExecutor:
    """Threads whose own tensor work is not spread over the cores again."""
    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    own = torch.get_num_threads()
    started = threading.Barrier(workers + 1)

    def settle() -> None:
        torch.get_num_threads()  # a thread takes the common number when it first asks: later it would undo the next line
        torch.set_num_threads(1)
        started.wait()

    try:
        for _ in range(workers):
            pool.submit(settle)
        started.wait()
    except BaseException:  # Ctrl-C, or the system gives no more threads: those that wait here would never end
        started.abort()
        raise
    torch.set_num_threads(own)  # what threads that start later begin with; those of the pool keep their one
    return pool
