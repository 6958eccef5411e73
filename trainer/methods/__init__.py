"""Clustering methods, one per file; `METHODS` maps the name in YAML to the class. Adding one: a file, a line here, a YAML."""

from __future__ import annotations

from trainer.methods.ae_kmeans import AEKMeans
from trainer.methods.base import Method
from trainer.methods.centering import Centering
from trainer.methods.dcn import DCN
from trainer.methods.dec import DEC
from trainer.methods.deepcluster import DeepCluster
from trainer.methods.deepcluster_mixture import DeepClusterMixture
from trainer.methods.deepcluster_v2 import DeepClusterV2
from trainer.methods.dekm import DEKM
from trainer.methods.dkm import DKM
from trainer.methods.idec import IDEC
from trainer.methods.lcc import LCC
from trainer.methods.smoothed_kmeans import SmoothedKMeans
from trainer.methods.stochastic_quantization import StochasticQuantization

METHODS: dict[str, type[Method]] = {
    "ae_kmeans": AEKMeans,
    "smoothed_kmeans": SmoothedKMeans,
    "dec": DEC,
    "idec": IDEC,
    "dcn": DCN,
    "dkm": DKM,
    "centering": Centering,
    "dekm": DEKM,
    "deepcluster": DeepCluster,
    "deepcluster_v2": DeepClusterV2,
    "deepcluster_mixture": DeepClusterMixture,
    "lcc": LCC,
    "stochastic_quantization": StochasticQuantization,
}

__all__ = ["METHODS", "Method"]
