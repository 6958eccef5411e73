"""ONNX contract 1: the names, types, shapes and metadata of an exported model. The exporter writes to it, the runtime reads by it.

Axis letters: N frames in one run, H x W pixels of the ROI, K clusters, D embedding size, M calibration parts, h x w novelty map.
`docs/contracts.md` is the page for users; the two change together.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

from edge_dkm.errors import ContractError

CONTRACT = 1
IR_VERSION = 8  # the newest that onnxruntime 1.14 to 1.16 read; newer defaults do not load in today's runtimes
OPSET = 18

IMAGE = "image"
PIXELS, FEATURES = (
    "pixels",
    "features",
)  # inner tensors between which the encoder lies; `bench` tells the stages by them
MAP = "map_"  # in front of the layer's name: inner tensors of the encoder that a bank looks at

Verdict = Literal["pass", "review", "reject"]
VERDICTS: tuple[Verdict, ...] = ("pass", "review", "reject")
Precision = Literal["fp32", "int8"]


@dataclass(frozen=True)
class TensorSpec:
    """One input or output. `dtype` is onnxruntime's name for it; a letter in `shape` is one of the axes above."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


INPUT = TensorSpec(IMAGE, "tensor(uint8)", ("N", "H", "W", 3))

OUTPUTS = (
    TensorSpec("cluster_id", "tensor(int64)", ("N",)),
    TensorSpec("distance", "tensor(float)", ("N",)),
    TensorSpec("novelty_score", "tensor(float)", ("N",)),
    TensorSpec("p_value", "tensor(float)", ("N",)),
    TensorSpec("is_novel", "tensor(bool)", ("N",)),
    TensorSpec("distances", "tensor(float)", ("N", "K")),
    TensorSpec("embedding", "tensor(float)", ("N", "D")),
)
PATCH_OUTPUTS = (
    TensorSpec("patch_score", "tensor(float)", ("N",)),
    TensorSpec("novelty_map", "tensor(float)", ("N", "h", "w")),
)

THRESHOLD = TensorSpec("novelty_threshold", "tensor(float)", (1,))
# The codebook: fed whole or not at all.
CODEBOOK = (
    TensorSpec("centroids", "tensor(float)", ("K", "D")),
    TensorSpec("cluster_mean", "tensor(float)", ("K", "D")),
    TensorSpec("cluster_radius", "tensor(float)", ("K",)),
    TensorSpec("novelty_scale", "tensor(float)", (1,)),
    TensorSpec("calibration", "tensor(float)", ("M",)),
    TensorSpec("calibration_weight", "tensor(float)", ("M",)),
)
OVERRIDABLE = (THRESHOLD, *CODEBOOK)

# metadata_props: every value is a string; True means that the string is JSON.
METADATA: Mapping[str, bool] = {
    "dkm.contract": False,
    "dkm.model_id": False,
    "dkm.producer": False,
    "dkm.created": False,
    "dkm.method": False,
    "dkm.encoder": False,
    "dkm.embed_dim": False,
    "dkm.n_clusters": False,
    "dkm.metric": False,
    "dkm.input": True,
    "dkm.preprocess": True,
    "dkm.projection": True,
    "dkm.clusters": True,
    "dkm.novelty": True,
    "dkm.train": True,
    "dkm.metrics": True,
    "dkm.reference_hist": True,
    "dkm.parity": True,
    "dkm.precision": False,
    "dkm.quantization": True,
    "dkm.golden_sha256": False,
    "dkm.license": False,
}


@dataclass(frozen=True)
class Cluster:
    """One row of the cluster table. `verdict` None: the line's default applies. Quantiles are of novelty distance / radius."""

    id: int
    name: str
    verdict: Verdict | None
    n: int
    radius: float
    q50: float
    q99: float


@dataclass(frozen=True)
class InputSpec:
    """What the graph takes. `h`, `w` None: any size. `roi` (x, y, w, h) and `frame` (w, h) are those of the training frames."""

    layout: str
    dtype: str
    color: str
    h: int | None
    w: int | None
    fit: str
    roi: tuple[int, int, int, int] | None = None
    frame: tuple[int, int] | None = None

    @property
    def trained_size(self) -> tuple[int, int] | None:
        """(width, height) of what the graph is meant for: its own size, else the training's ROI, else its frames; None where those varied."""
        if self.w and self.h:
            return self.w, self.h
        return (self.roi[2], self.roi[3]) if self.roi else self.frame


@dataclass(frozen=True)
class Metadata:
    """The metadata of one model, read once. `novelty` and `raw` hold the rest as plain values."""

    model_id: str
    method: str
    encoder: str
    created: str
    embed_dim: int
    n_clusters: int
    l2: bool
    clusters: tuple[Cluster, ...]
    input: InputSpec
    novelty: Mapping[str, object]
    golden_sha256: str
    raw: Mapping[str, str]
    precision: Precision = "fp32"

    @property
    def has_patches(self) -> bool:
        """Whether the graph looks at patches too: `patch_score` joins the raw score, `novelty_map` shows where."""
        return "bank" in self.novelty

    @property
    def head_inputs(self) -> tuple[str, ...]:
        """The outputs from which the head can be worked out anew for another codebook: the embedding, and what joins it."""
        return ("embedding", "patch_score") if self.has_patches else ("embedding",)

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Those of this model's graph."""
        return OUTPUTS + PATCH_OUTPUTS if self.has_patches else OUTPUTS


def parse_metadata(props: Mapping[str, str], name: str) -> Metadata:
    """Reads `metadata_props`; `name` is the model's name for messages.

    Raises:
        ContractError: no `dkm.contract`, another contract, or a value that is missing or malformed.
    """
    if "dkm.contract" not in props:
        raise ContractError(f"{name} is an ONNX model without dkm.contract, expected one written by dkm-export")
    if props["dkm.contract"] != str(CONTRACT):
        raise ContractError(
            f"{name} has contract {props['dkm.contract']}, this runtime speaks contract {CONTRACT}; "
            f"export it again with a matching dkm-export, or update edge-dkm"
        )
    try:
        clusters = tuple(
            Cluster(c["id"], c["name"], _verdict(c.get("verdict")), c["n"], c["radius"], c["q50"], c["q99"])
            for c in json.loads(props["dkm.clusters"])
        )
        spec = json.loads(props["dkm.input"])
        metadata = Metadata(
            model_id=props["dkm.model_id"],
            method=props["dkm.method"],
            encoder=props["dkm.encoder"],
            created=props["dkm.created"],
            embed_dim=int(props["dkm.embed_dim"]),
            n_clusters=int(props["dkm.n_clusters"]),
            l2=bool(json.loads(props["dkm.projection"])["l2"]),
            clusters=clusters,
            input=InputSpec(
                spec["layout"],
                spec["dtype"],
                spec["color"],
                spec["h"],
                spec["w"],
                spec["fit"],
                tuple(spec["roi"]) if spec.get("roi") else None,
                tuple(spec["frame"]) if spec.get("frame") else None,
            ),
            novelty=json.loads(props["dkm.novelty"]),
            golden_sha256=props["dkm.golden_sha256"],
            raw=dict(props),
            precision=_precision(props.get("dkm.precision", "fp32")),  # absent before it was written
        )
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ContractError(
            f"{name} has unreadable metadata ({type(error).__name__}: {error}), expected that of contract {CONTRACT}"
        ) from None
    if [c.id for c in clusters] != list(range(metadata.n_clusters)):
        raise ContractError(
            f"{name} lists the clusters {[c.id for c in clusters]}, expected 0 to {metadata.n_clusters - 1}"
        )
    return metadata


def _verdict(value: object) -> Verdict | None:
    if value is None or value in VERDICTS:
        return value
    raise ValueError(f"verdict {value!r}")


def _precision(value: str) -> Precision:
    if value in {"fp32", "int8"}:
        return cast(Precision, value)
    raise ValueError(f"precision {value!r}")


def check_tensors(
    name: str,
    what: str,
    actual: Mapping[str, tuple[str, list[object]]],
    expected: tuple[TensorSpec, ...],
    sizes: Mapping[str, int],
) -> None:
    """Compares names, dtypes and shapes; a letter without an entry in `sizes` fits any size.

    Raises:
        ContractError: naming the tensor, what it is and what was expected.
    """
    for spec in expected:
        if spec.name not in actual:
            raise ContractError(f"{name} has no {what} '{spec.name}', expected {', '.join(s.name for s in expected)}")
        dtype, shape = actual[spec.name]
        wanted = [sizes.get(axis, axis) if isinstance(axis, str) else axis for axis in spec.shape]
        fits = len(shape) == len(wanted) and all(
            want == got or (isinstance(want, str) or not isinstance(got, int))
            for want, got in zip(wanted, shape, strict=True)
        )
        if dtype != spec.dtype or not fits:
            raise ContractError(f"{name}: {what} '{spec.name}' is {dtype} {shape}, expected {spec.dtype} {wanted}")
