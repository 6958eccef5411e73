"""The settings that a sweep compares: methods put in place of each other, a grid of values, or random draws from a space.

A setting, or a value of one, that only other methods have is left out for a method; one that no method has is an error.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from configs.document import ConfigError, parse_value
from trainer.methods import METHODS
from trainer.settings import TrainSettings
from trainer.trials import changed

CONTROL = "ae_kmeans"
FIXED = ("train.seed", "method.n_clusters")  # of all rows of a sweep
# What a method needs to work on features as they come, where its defaults are those of its paper.
STARTS: dict[str, dict[str, Any]] = {
    "length_scale": {"length_scale": "auto", "optimizer": {"kind": "adam", "lr": 0.001}},
}
# The built-in space of --search: modest, and only what a method or a projection has.
SPACE: dict[str, tuple[Any, ...]] = {
    "method.optimizer.lr": (0.0001, 0.0003, 0.001, 0.003),
    "method.epochs": (10, 20, 40),
    "projection.dim": (16, 32, 64, 128),
    "projection.whiten": (0.0, 0.15, 0.25),
}


@dataclass(frozen=True)
class Range:
    """`low..high`: whole numbers where both are, else real ones; drawn evenly over the logarithm where it spans a decade."""

    low: float
    high: float
    is_whole: bool

    def draw(self, rng: np.random.Generator) -> float | int:
        """One value."""
        if self.low > 0 and self.high / self.low >= 10:
            value = math.exp(rng.uniform(math.log(self.low), math.log(self.high)))
        else:
            value = rng.uniform(self.low, self.high)
        return round(value) if self.is_whole else float(f"{value:.3g}")


Space = Mapping[str, Range | Sequence[Any]]


@dataclass(frozen=True)
class Variant:
    """One row of a sweep: settings without the seed, and what to call them."""

    name: str
    settings: TrainSettings

    @property
    def folder(self) -> str:
        """A folder name that other settings do not share."""
        digest = hashlib.sha256(json.dumps(self.settings.plain(), sort_keys=True).encode()).hexdigest()[:8]
        return f"{re.sub(r'[^A-Za-z0-9_.=-]+', '-', self.name)[:60].strip('-')}-{digest}"


def parse_grid(items: Sequence[str]) -> dict[str, Range | list[Any]]:
    """`a.b=1,2,3` (or `low..high`) items as a space.

    Raises:
        ConfigError: an item is not of that form.
    """
    space: dict[str, Range | list[Any]] = {}
    for item in items:
        key, equals, text = item.partition("=")
        if not equals or not key or not text or key in FIXED or key.split(".")[0] == "data":
            raise ConfigError(
                [
                    f"--grid {item}: expected key.subkey=value,value or low..high (not of data or {', '.join(FIXED)}: every row gets "
                    f"the same images, seeds and number of clusters; for that there is select-k)"
                ]
            )
        bounds = re.fullmatch(r"([0-9.e+-]+?)\.\.([0-9.e+-]+)", text)
        space[key] = _range(item, *bounds.groups()) if bounds else _values(text)
    return space


def _range(item: str, low_text: str, high_text: str) -> Range:
    try:
        low, high = float(low_text), float(high_text)
    except ValueError:
        raise ConfigError([f"--grid {item}: expected numbers around .., as 0.001..0.1"]) from None
    if not low < high:
        raise ConfigError([f"--grid {item}: {low_text} is not below {high_text}, expected low..high"])
    return Range(low, high, low_text.isdigit() and high_text.isdigit())


def _values(text: str) -> list[Any]:
    value = parse_value(f"[{text}]", "--grid").plain()
    return value if isinstance(value, list) else [value]


def with_method(settings: TrainSettings, name: str) -> TrainSettings:
    """The settings with another method at its defaults, where these do not fit features as they come, at ours.

    Raises:
        ConfigError: there is no such method.
    """
    if name not in METHODS:
        match = difflib.get_close_matches(name, METHODS, n=1)
        raise ConfigError(
            [
                f"--methods: {name} is no method, expected of {', '.join(METHODS)}"
                + (f"; did you mean {match[0]}?" if match else "")
            ]
        )
    if settings.method.name == name:
        return settings
    section: dict[str, Any] = {"name": name, "n_clusters": settings.method.n_clusters, "n_init": settings.method.n_init}
    for key, start in STARTS.items():
        if key in METHODS[name].Settings.model_fields:
            section |= start
    changes: dict[str, Any] = {"method": section}
    trains = "optimizer" in METHODS[name].Settings.model_fields
    if trains and settings.projection.kind != "none" and is_frozen(settings):
        changes["projection.learn"] = True  # else there is nothing that the method could move
    starts_as_built = not is_frozen(settings) and not getattr(settings.encoder, "weights", None)
    if name == CONTROL and settings.pretrain.kind == "none" and starts_as_built:
        # Of a method from scratch: an encoder that nothing has trained is no control.
        changes["pretrain.kind"] = "end_to_end"
    return changed(settings, changes, f"--methods {name}")


def is_frozen(settings: TrainSettings) -> bool:
    """Whether the encoder stays as it is."""
    return not getattr(settings.encoder, "trainable", settings.encoder.name not in {"pretrained"})


def expand(bases: Sequence[TrainSettings], methods: Sequence[str], space: Space, search: int | None) -> list[Variant]:
    """The rows beside the control, without repetition.

    Args:
        search: number of draws for each method; None: every combination.

    Raises:
        ConfigError: a key or value does not fit, or a range is given without `search`.
    """
    found: dict[str, Variant] = {}
    rows = [(name, with_method(base, name)) for base in bases for name in methods or [base.method.name]]
    grid = space or _built_in(search)
    taken = [_taken(settings, grid) for _, settings in rows]
    for (name, settings), mine in zip(rows, taken, strict=True):
        own = {key: left for key in mine if (left := _without_others(key, grid[key], mine, taken))}
        for point in _points(own, search):
            label = ", ".join([name, *(f"{key.split('.', 1)[-1]}={value}" for key, value in point.items())])
            variant = Variant(label, changed(settings, point, "--grid"))
            found.setdefault(json.dumps(variant.settings.plain(), sort_keys=True), variant)
    unused = sorted(set(space).difference(*taken))
    if unused:
        raise ConfigError([f"--grid {unused[0]}: no method of this sweep has such a setting"])
    return _named_apart(list(found.values()))


def _built_in(search: int | None) -> Space:
    return SPACE if search is not None else {}


def _has(settings: TrainSettings, key: str) -> bool:
    section: Any = settings.plain()
    if key.startswith("projection.") and settings.projection.kind == "none":
        return False
    for part in key.split("."):
        if not isinstance(section, dict) or part not in section:
            return False
        section = section[part]
    return True


def _taken(settings: TrainSettings, space: Space) -> dict[str, list[Any]]:
    """The keys that this method has, each with those of its listed values that the method takes."""
    return {
        key: [] if isinstance(values, Range) else [value for value in values if _takes(settings, key, value)]
        for key, values in space.items()
        if _has(settings, key)
    }


def _without_others(
    key: str, values: Range | Sequence[Any], mine: Mapping[str, list[Any]], taken: Sequence[Mapping[str, list[Any]]]
) -> Range | list[Any]:
    """`values` of a key but for those that only other methods take; one that none takes stays, for its error to be seen."""
    if isinstance(values, Range):
        return values
    known = [value for others in taken for value in others.get(key, ())]
    return [value for value in values if value in mine[key] or value not in known]


def _takes(settings: TrainSettings, key: str, value: Any) -> bool:
    try:
        changed(settings, {key: value}, "--grid")
    except ConfigError:
        return False
    return True


def _points(space: Space, search: int | None) -> Iterator[dict[str, Any]]:
    if search is not None:
        rng = np.random.default_rng(0)  # the same draws in every call, so that a restart reuses its runs
        for _ in range(search if space else 1):
            yield {
                key: values.draw(rng) if isinstance(values, Range) else values[int(rng.integers(len(values)))]
                for key, values in space.items()
            }
        return
    ranges = [key for key, values in space.items() if isinstance(values, Range)]
    if ranges:
        raise ConfigError(
            [f"--grid {ranges[0]}: a range is drawn from, expected --search N beside it, or a list of values"]
        )
    lists = [list(values) for values in space.values() if not isinstance(values, Range)]
    for values in itertools.product(*lists):
        yield dict(zip(space, values, strict=True))


def _named_apart(variants: list[Variant]) -> list[Variant]:
    """Names with a number where two settings files give the same one."""
    names = [variant.name for variant in variants]
    return [
        Variant(f"{variant.name} #{names[: n + 1].count(variant.name)}", variant.settings)
        if names.count(variant.name) > 1
        else variant
        for n, variant in enumerate(variants)
    ]
