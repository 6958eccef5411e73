"""Looks over a set of images before training: how many, of which sizes and classes, what cannot be used, what is there twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from trainer.data import Skipped
from trainer.images import BadImageError, DataSettings, Item, open_images

TINY_PX = 32
SHOWN = 10


@dataclass(frozen=True)
class Scan:
    """Counts over one set. `duplicates`: (copy, original) of byte-identical images; `tiny`: below 32 px on a side."""

    path: str
    images: int
    groups: int
    classes: dict[str, int]
    sizes: dict[str, int]
    grey: int
    unreadable: list[Skipped]
    duplicates: list[tuple[str, str]]
    tiny: list[str]

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def text(self) -> str:
        """For people."""
        sizes = ", ".join(f"{size} ({n})" for size, n in list(self.sizes.items())[:6]) + (
            ", ..." if len(self.sizes) > 6 else ""
        )
        lines = [
            f"images      {self.images} usable in {self.groups} groups, {self.grey} of them grey",
            f"classes     {', '.join(f'{name} {n}' for name, n in self.classes.items()) or 'none (no class folders)'}",
            f"sizes       {sizes}",
            f"unreadable  {len(self.unreadable)}",
        ]
        lines += [f"            {skipped.name}: {skipped.reason}" for skipped in self.unreadable[:SHOWN]]
        lines.append(
            f"duplicates  {len(self.duplicates)}"
            + "".join(f"\n            {copy} = {original}" for copy, original in self.duplicates[:SHOWN])
        )
        lines.append(f"tiny        {len(self.tiny)}" + "".join(f"\n            {name}" for name in self.tiny[:SHOWN]))
        return "\n".join(lines)


def scan(path: str, progress: Callable[[Sequence[Item]], Iterator[Item]] = iter) -> Scan:
    """Reads every image of the set once; raises DataError where there is none."""
    images = open_images(DataSettings(path=path))
    classes: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    unreadable, duplicates, tiny, groups, grey = [], [], [], set(), 0
    first: dict[str, str] = {}
    for item in progress(images.items):
        try:
            image, sha = item.read()
        except BadImageError as error:
            unreadable.append(Skipped(item.name, str(error)))
            continue
        height, width, channels = image.shape
        sizes[f"{width}x{height}"] += 1
        grey += channels == 1
        groups.add(item.group)
        if item.label is not None:
            classes[item.label] += 1
        if min(height, width) < TINY_PX:
            tiny.append(item.name)
        if first.setdefault(sha, item.name) != item.name:
            duplicates.append((item.name, first[sha]))
    return Scan(
        images.path,
        sum(sizes.values()),
        len(groups),
        dict(classes),
        dict(sizes.most_common()),
        grey,
        unreadable,
        duplicates,
        tiny,
    )
