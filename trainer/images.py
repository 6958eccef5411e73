"""Finds training images wherever they lie: class folders, archives, lists, npz arrays, `edge-dkm record` folders, the frames of a film.

Nothing is decoded here until an item is read; trainer/data.py reads them all.
"""

from __future__ import annotations

import csv
import hashlib
import os
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal, cast

import cv2
import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from configs import Settings
from trainer.archives import ARCHIVE_SUFFIXES, COMPRESSED_TARS, MemberImage, open_archive
from trainer.errors import DataError
from trainer.items import BadImageError, Encoded, FileImage, Image, ImageSet, Item
from trainer.npz_rows import RowImage, open_rows

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".pgm", ".ppm"})
FILM_SUFFIXES = frozenset({".mp4", ".avi", ".mkv", ".mov", ".m4v", ".webm"})
FILM_GROUP_FRAMES = 30  # neighbouring frames show the same thing: a second of film counts as one group
RECORD_COLUMNS = frozenset({"file", "camera", "group", "roi"})
PLACES = "a folder, an .npz, a list (.txt, .csv), an archive (.zip, .tar) or a film"


class DataSettings(Settings):
    """Which images. Class folders are labels for scoring; the method never sees them, unless it is a supervised one."""

    path: str = Field(description=PLACES)
    kind: Literal["auto", "folder", "npz", "list", "record", "film", "archive"] = "auto"
    classes: tuple[str, ...] | None = Field(None, description="only these class folders")
    good: str = Field("good", description="the class folder of known good parts; novelty is calibrated on it")
    groups: str | None = Field(None, description="CSV with a file column (path or file) and the group column")
    group_column: str = "group"
    split: Literal["train", "test", "all"] = Field(
        "all", description="of an .npz that has a split array: 0 train, 1 test"
    )
    every: int = Field(1, ge=1, description="of a film: every n-th frame")
    limit: int | None = Field(None, ge=1, description="at most this many images, evenly spaced over the set")
    workers: int | None = Field(None, ge=1, le=1024, description="threads that decode; all cores unless given")
    memory: Literal["auto", "ram", "disk"] = Field(
        "auto", description="where decoded pixels are kept; auto: on disk where they would take more than ram_share"
    )
    ram_share: float = Field(0.5, gt=0, le=1, description="of the memory that is available when reading begins")
    scratch: str | None = Field(None, description="folder for decoded pixels on disk; the run folder's unless given")


def open_images(settings: DataSettings) -> ImageSet:
    """Finds the images without decoding them.

    Raises:
        DataError: nothing there, or nothing that is an image.
    """
    path = Path(settings.path)
    if not path.exists():
        raise DataError(f"data.path is {path}, which does not exist (looked in {Path.cwd()}); point it at {PLACES}")
    kind = _kind_of(path) if settings.kind == "auto" else settings.kind
    for name, home in (("split", "npz"), ("every", "film")):
        if getattr(settings, name) != DataSettings.model_fields[name].default and kind != home:
            raise DataError(
                f"data.{name} is {getattr(settings, name)}, which is for kind {home} only, but data.path {path} is a {kind}; leave it out"
            )
    finders = {
        "folder": _folder, "record": _record, "npz": _npz, "list": _list, "film": _film, "archive": _archive
    }  # fmt: skip
    found = finders[kind](path, settings)
    items = found.items
    if settings.classes is not None:
        missing = sorted(set(settings.classes) - {item.label for item in items if item.label})
        if missing:
            there = ", ".join(sorted({item.label for item in items if item.label})) or "no class folders"
            raise DataError(f"data.classes names '{missing[0]}', which {path} does not have; it has {there}")
        items = [item for item in items if item.label in settings.classes]
    if settings.groups is not None:
        items = _with_groups(items, Path(settings.groups), settings.group_column)
    if settings.limit is not None and settings.limit < len(items):
        items = [items[n * len(items) // settings.limit] for n in range(settings.limit)]
    if not items:
        raise DataError(f"data.path is {path}, which holds no images ({', '.join(sorted(SUFFIXES))})")
    return ImageSet(str(path), items, found.roi, found.frame, found.is_sequential)


def _kind_of(path: Path) -> str:
    if path.is_dir():
        index = path / "index.csv"
        return "record" if index.is_file() and set(next(iter(_cells(index)), [])) >= RECORD_COLUMNS else "folder"
    if path.suffix == ".npz":
        return "npz"
    if path.suffix.lower() in FILM_SUFFIXES:
        return "film"
    if path.suffix in {".txt", ".csv", ".lst"}:
        return "list"
    if path.suffix.lower() in ARCHIVE_SUFFIXES or path.name.lower().endswith(COMPRESSED_TARS):
        return "archive"
    raise DataError(f"data.path is {path}, expected {PLACES} ({', '.join(sorted(FILM_SUFFIXES))})")


def _folder(path: Path, settings: DataSettings) -> ImageSet:
    names: list[str] = []
    for folder, _, files in os.walk(path):
        below = "" if Path(folder) == path else Path(folder).relative_to(path).as_posix() + "/"
        names += [below + n for n in files if _is_image(n) and os.path.isfile(os.path.join(folder, n))]  # noqa: PTH113, PTH118
    root = str(path)
    return ImageSet(root, _by_class_folder(names, lambda name: FileImage(root, name)))


def _archive(path: Path, settings: DataSettings) -> ImageSet:
    members = open_archive(path)
    place = {name: n for n, name in enumerate(members.names) if _is_image(name)}
    return ImageSet(str(path), _by_class_folder(place, lambda name: MemberImage(members, place[name])))


def _is_image(name: str) -> bool:
    base = name.rpartition("/")[2]
    return not base.startswith(".") and os.path.splitext(base)[1].lower() in SUFFIXES  # noqa: PTH122 (a Path keeps the parts of its name)


def _by_class_folder(names: Iterable[str], reader: Callable[[str], Encoded]) -> list[Item]:
    """An item per name, in the order of the names; the folder that it lies in is its label."""
    labels: dict[str, str] = {}  # each label once, however many images have it
    items = []
    for name in sorted(names, key=lambda name: name.split("/")):
        shown, folder = _printable(name), _printable(name.rpartition("/")[0])
        items.append(Item(shown, labels.setdefault(folder, folder) or None, shown, reader(name)))
    return items


def _printable(name: str) -> str:
    """A name that is not UTF-8 on disk, as it can be written into a table."""
    if name.isascii():
        return name
    shown = os.fsencode(name).decode("utf-8", "replace")
    return name if shown == name else shown


def _record(path: Path, settings: DataSettings) -> ImageSet:
    rows = _table(path / "index.csv")
    items = [
        Item(row["file"], None, f"{row['camera']}/{row['group']}", FileImage(str(path), row["file"])) for row in rows
    ]
    roi = _numbers({row["roi"] for row in rows if row.get("roi")}, " ", 4, path)
    frame = _numbers({row["frame"] for row in rows if row.get("frame")}, "x", 2, path)
    return ImageSet(
        str(path), items, cast("tuple[int, int, int, int] | None", roi), cast("tuple[int, int] | None", frame)
    )


def _numbers(found: set[str], separator: str, count: int, path: Path) -> tuple[int, ...] | None:
    """The one value of a column that all rows share, as numbers; None where rows differ or there is none."""
    if len(found) != 1:
        return None
    (text,) = found
    parts = [part for part in text.split(separator) if part]
    if len(parts) != count or not all(part.isdigit() for part in parts):
        raise DataError(f"{path / 'index.csv'} has '{text}', expected {count} whole numbers joined by '{separator}'")
    return tuple(int(part) for part in parts)


def _list(path: Path, settings: DataSettings) -> ImageSet:
    """One image per line, `file[,label[,group]]`, or a CSV whose header names file (or path), label (or class) and group."""
    # A name may hold a comma or begin with #: what is there as a file is that file.
    rows = [[line] if (path.parent / (line := ",".join(row))).is_file() else row for row in _cells(path)]
    rows = [row for row in rows if not row[0].startswith("#") or (path.parent / row[0]).is_file()]
    header = [name.strip().lower() for name in rows[0]] if rows else []
    columns = {
        role: next((header.index(name) for name in names if name in header), None)
        for role, names in (("file", ("file", "path")), ("label", ("label", "class")), ("group", ("group",)))
    }
    if columns["file"] is None:
        columns = {"file": 0, "label": 1, "group": 2}
    else:
        rows = rows[1:]

    def cell(row: list[str], role: str) -> str | None:
        n = columns[role]
        return row[n].strip() or None if n is not None and n < len(row) else None

    items = []
    for row in rows:
        name = cell(row, "file")
        if name:
            items.append(Item(name, cell(row, "label"), cell(row, "group") or name, FileImage(str(path.parent), name)))
    return ImageSet(str(path), items)


def _npz(path: Path, settings: DataSettings) -> ImageSet:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            names = [name for name in ("X", "y", "split", "classes") if name in archive]
            in_file = open_rows(path, "X")
            arrays = {name: archive[name] for name in names if name != "X" or in_file is None}
    except (OSError, ValueError, TypeError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise DataError(f"data.path is {path}, which is no readable .npz: {error}") from None
    x = arrays.get("X") if in_file is None else in_file
    if x is None or x.dtype != np.uint8 or x.ndim not in {3, 4} or (x.ndim == 4 and x.shape[3] not in {1, 3}):
        shown = "no array X" if x is None else f"X of {x.dtype} {x.shape}"
        raise DataError(f"{path} has {shown}, expected X uint8 (N, H, W) grey or (N, H, W, 3) BGR")
    y = arrays.get("y")
    for name in ("y", "split"):
        if name in arrays and arrays[name].shape != (len(x),):
            raise DataError(f"{path} has {len(x)} images X but {name} of {arrays[name].shape}, expected ({len(x)},)")
    if (
        y is not None
        and "classes" in arrays
        and len(y)
        and not 0 <= int(y.min()) <= int(y.max()) < len(arrays["classes"])
    ):
        raise DataError(f"{path} has labels y of {y.min()} to {y.max()}, but {len(arrays['classes'])} classes")
    keep = np.arange(len(x))
    if settings.split != "all":
        if "split" not in arrays:
            raise DataError(f"data.split is {settings.split}, but {path} has no array split")
        keep = np.flatnonzero(arrays["split"] == (0 if settings.split == "train" else 1))
    labels = None if y is None else _class_names(y, arrays.get("classes"))
    return ImageSet(
        str(path),
        [
            Item(f"{path.name}[{n}]", None if labels is None else labels[n], str(n), RowImage(x, n))
            for n in keep.tolist()
        ],
    )


def _class_names(y: NDArray[np.generic], names: NDArray[np.generic] | None) -> list[str]:
    """The label of each image; images of one class share the text."""
    texts = {value: str(value if names is None else names[value]) for value in np.unique(y).tolist()}
    return [texts[value] for value in y.tolist()]


def _film(path: Path, settings: DataSettings) -> ImageSet:
    capture = cv2.VideoCapture(str(path))
    count = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    if not capture.isOpened() or count < 1:
        raise DataError(f"data.path is {path}, a film that OpenCV cannot open")
    reader = _FilmReader(capture, path)
    items = [
        Item(f"{path.name}#{n}", None, str(n // FILM_GROUP_FRAMES), reader.at(n))
        for n in range(0, count, settings.every)
    ]
    return ImageSet(str(path), items, is_sequential=True)


class _FilmReader:
    """Frames by number; reading forwards decodes each once, seeking back starts again from the first."""

    def __init__(self, capture: cv2.VideoCapture, path: Path) -> None:
        self._capture, self._path, self._next = capture, path, 0

    def at(self, number: int) -> Callable[[], tuple[Image, str]]:
        def read() -> tuple[Image, str]:
            if number < self._next:
                self._capture, self._next = cv2.VideoCapture(str(self._path)), 0
            while self._next < number and self._capture.grab():
                self._next += 1
            ok, image = self._capture.read()
            self._next += 1
            if not ok:
                raise BadImageError("the film ends before this frame")
            return np.asarray(image, np.uint8), hashlib.sha256(image.tobytes()).hexdigest()

        return read


def _with_groups(items: Sequence[Item], path: Path, column: str) -> list[Item]:
    """Matches a whole path, else its tail: a groups file that was written above or below this folder still fits."""
    if not path.is_file():
        raise DataError(f"data.groups is {path}, which does not exist")
    rows = _table(path)
    name_column = next((c for c in ("path", "file") if rows and c in rows[0]), None)
    if not rows or name_column is None or column not in rows[0]:
        raise DataError(
            f"{path} has the columns {', '.join(rows[0]) if rows else 'none'}, expected path (or file) and {column}"
        )
    exact = {row[name_column]: row[column] for row in rows}
    by_tail: dict[str, set[str]] = {}
    for name, group in exact.items():
        for tail in _tails(name):
            by_tail.setdefault(tail, set()).add(group)
    groups = {item.name: _group_of(item.name, exact, by_tail, path) for item in items}
    missing = [name for name, group in groups.items() if group is None]
    if missing:
        raise DataError(f"{path} names no group for {missing[0]} ({len(missing)} of {len(items)} images have none)")
    return [Item(item.name, item.label, groups[item.name] or "", item.read) for item in items]


def _tails(name: str) -> list[str]:
    """`a/b/c.png` -> `b/c.png`, `c.png`; the longest first."""
    parts = name.split("/")
    return ["/".join(parts[n:]) for n in range(1, len(parts))]


def _group_of(name: str, exact: dict[str, str], by_tail: dict[str, set[str]], path: Path) -> str | None:
    if name in exact:
        return exact[name]
    found = by_tail.get(name, set())
    if len(found) > 1:
        raise DataError(
            f"{path} gives {name} the groups {', '.join(sorted(found))} (its rows name several folders that hold one); "
            f"point data.path at the folder that its paths start from"
        )
    return next(iter(found), None) or next((exact[tail] for tail in _tails(name) if tail in exact), None)


def _table(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV with a header."""
    rows = _cells(path)
    return [dict(zip(rows[0], row, strict=False)) for row in rows[1:] if len(row) >= len(rows[0])] if rows else []


def _cells(path: Path) -> list[list[str]]:
    """The rows of a CSV.

    Raises:
        DataError: it cannot be read, or is not UTF-8.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return [row for row in csv.reader(file) if row]
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8; save it as UTF-8") from None
    except (OSError, csv.Error) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
