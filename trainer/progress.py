"""How training and reading report: bars on a terminal, plain lines otherwise, nothing when quiet."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeVar

from tqdm import tqdm

T = TypeVar("T")
LINE_EVERY_S = 10.0


class Progress(Protocol):
    """What the trainer calls."""

    def read(self, items: Sequence[T]) -> Iterator[T]: ...
    def stage(self, name: str, epochs: int, first: int) -> None: ...
    def epoch(self, epoch: int, figures: dict[str, float]) -> None: ...
    def say(self, text: str) -> None: ...
    def close(self) -> None: ...


class Silent:
    """For library use."""

    def read(self, items: Sequence[T]) -> Iterator[T]:
        return iter(items)

    def stage(self, name: str, epochs: int, first: int) -> None: ...

    def epoch(self, epoch: int, figures: dict[str, float]) -> None: ...

    def say(self, text: str) -> None: ...

    def close(self) -> None: ...


class Terminal:
    """For the command line, on stderr: stdout belongs to results."""

    def __init__(self) -> None:
        self._tty = sys.stderr.isatty()
        self._bar: tqdm[Any] | None = None
        self._name, self._epochs, self._said_s = "", 0, 0.0

    def read(self, items: Sequence[T]) -> Iterator[T]:
        return iter(tqdm(items, "read images", unit="img", leave=False, file=sys.stderr, disable=not self._tty))

    def stage(self, name: str, epochs: int, first: int) -> None:
        self.close()
        self._name, self._epochs, self._said_s = name, epochs, time.monotonic()
        if self._tty:
            self._bar = tqdm(total=epochs, initial=first, desc=name, unit="epoch", file=sys.stderr)
        else:
            self.say(f"{name}: {epochs} epochs" + (f", from epoch {first}" if first else ""))

    def epoch(self, epoch: int, figures: dict[str, float]) -> None:
        shown = {key: f"{value:.4g}" for key, value in figures.items() if key not in {"lr", "seconds"}}
        if self._bar is not None:
            self._bar.set_postfix(shown)
            self._bar.update(epoch + 1 - self._bar.n)
        elif time.monotonic() - self._said_s >= LINE_EVERY_S or epoch + 1 == self._epochs:
            self._said_s = time.monotonic()
            self.say(f"{self._name} {epoch + 1}/{self._epochs} " + " ".join(f"{k}={v}" for k, v in shown.items()))

    def say(self, text: str) -> None:
        tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
