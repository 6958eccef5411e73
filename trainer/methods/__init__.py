"""Clustering methods, one per file; `METHODS` maps the name in YAML to the class. Adding one: a file, a line here, a YAML."""

from __future__ import annotations

from trainer.methods.ae_kmeans import AEKMeans
from trainer.methods.base import Method
from trainer.methods.dec import DEC

METHODS: dict[str, type[Method]] = {
    "ae_kmeans": AEKMeans,
    "dec": DEC,
}

__all__ = ["METHODS", "Method"]
