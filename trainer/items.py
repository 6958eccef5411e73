"""One image of a set: its name, class folder and group, and how its pixels are got when they are asked for.

Millions of them are held at once, so each is a few small objects; what many have in common (a folder, an archive) they share.
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]


class BadImageError(ValueError):
    """One image cannot be used; the text says why."""


@dataclass(frozen=True, slots=True)
class Item:
    """One image: `read()` decodes it to (H, W, 3 or 1) uint8 and returns the sha256 of its bytes beside it."""

    name: str
    label: str | None
    group: str
    read: Callable[[], tuple[Image, str]]

    def digest(self) -> str | None:
        """The sha256 that `read` returns, without decoding where the bytes are a file's; None where they cannot be read."""
        try:
            return sha256_of(self.read.data()) if isinstance(self.read, Encoded) else self.read()[1]
        except BadImageError:
            return None


@dataclass(frozen=True)
class ImageSet:
    """What was found, not yet decoded. `roi` (x, y, w, h) and `frame` (w, h) come from a record folder's index.

    `is_sequential`: images must be read one after the other, as a film's.
    """

    path: str
    items: Sequence[Item]
    roi: tuple[int, int, int, int] | None = None
    frame: tuple[int, int] | None = None
    is_sequential: bool = False


class Encoded(ABC):
    """An image that lies somewhere as the bytes of an image file."""

    __slots__ = ()

    @abstractmethod
    def data(self) -> bytes:
        """The bytes; raises BadImageError where they cannot be had."""

    def __call__(self) -> tuple[Image, str]:
        data = self.data()
        return decode(data), sha256_of(data)


class FileImage(Encoded):
    """An image file `name` in `folder`."""

    __slots__ = ("folder", "name")

    def __init__(self, folder: str, name: str) -> None:
        self.folder, self.name = folder, name

    def data(self) -> bytes:
        try:
            # Not through a Path, which keeps the parts of every name it has ever seen.
            with open(os.path.join(self.folder, self.name), "rb") as file:  # noqa: PTH118, PTH123
                return file.read()
        except OSError as error:
            raise BadImageError(f"cannot be read: {error.strerror or error}") from None
        except ValueError as error:  # a zero byte in the name
            raise BadImageError(f"cannot be read: {error}") from None


def sha256_of(data: bytes) -> str:
    """In hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def decode(data: bytes) -> Image:
    """Decodes an image file's bytes to (H, W, 3) uint8 BGR, or (H, W, 1) where all channels are equal.

    Raises:
        BadImageError: empty, no image, damaged, or deeper than 8 bits (the line gives 8 bits; a silent cut would differ from it).
    """
    if not data:
        raise BadImageError("is empty (0 bytes)")
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH)
    except cv2.error as error:
        raise BadImageError(f"cannot be decoded: {error.err}") from None
    if image is None:
        raise BadImageError(f"is no image that OpenCV can decode ({len(data)} bytes)")
    if image.dtype != np.uint8:
        raise BadImageError(f"has {image.dtype} pixels; convert it to the 8 bits that the line will see")
    if (image[..., 0] == image[..., 1]).all() and (image[..., 0] == image[..., 2]).all():
        return np.ascontiguousarray(image[..., :1])
    return np.asarray(image, np.uint8)
