"""Clustering methods, one per file; `METHODS` maps the name in YAML to the class. Adding one: a file, a line here, a YAML."""

from __future__ import annotations

from trainer.methods.ae_kmeans import AEKMeans
from trainer.methods.base import Method
from trainer.methods.centering import Centering
from trainer.methods.dcn import DCN
from trainer.methods.dec import DEC
from trainer.methods.dekm import DEKM
from trainer.methods.dkm import DKM
from trainer.methods.idec import IDEC
from trainer.methods.smoothed_kmeans import SmoothedKMeans

METHODS: dict[str, type[Method]] = {
    "ae_kmeans": AEKMeans,
    "smoothed_kmeans": SmoothedKMeans,
    "dec": DEC,
    "idec": IDEC,
    "dcn": DCN,
    "dkm": DKM,
    "centering": Centering,
    "dekm": DEKM,
}

__all__ = ["METHODS", "Method"]
