"""The station codebook: the six tensors that decide cluster and novelty, read and written with numpy alone.

A station is recentred by replacing this small file; the graph and its encoder stay. Safetensors layout: 8-byte little-endian
header length, JSON header, then the tensors' bytes. Used by `Inspector(model, codebook=...)`.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_dkm.contract import CODEBOOK, CONTRACT
from edge_dkm.errors import ContractError, ModelError

Tensors = Mapping[str, NDArray[np.float32]]
MAX_HEADER_BYTES = 100_000
MAX_BYTES = 256_000_000


@dataclass(frozen=True)
class Codebook:
    """`tensors`: the contract's six, float32. `metadata`: contract, model_sha256, alpha, n, groups, created, parent (all text)."""

    tensors: Tensors
    metadata: Mapping[str, str]
    sha12: str

    @property
    def model_sha256(self) -> str:
        """Digest of the model that this codebook was made for."""
        return self.metadata.get("model_sha256", "")


def check_codebook(tensors: Tensors, n_clusters: int, embed_dim: int, where: str) -> None:
    """Raises ContractError unless all six tensors are there with the right type and shape, finite and ordered."""
    sizes = {"K": n_clusters, "D": embed_dim, "M": len(tensors.get("calibration", ()))}
    for spec in CODEBOOK:
        if spec.name not in tensors:
            raise ContractError(f"{where} has no tensor '{spec.name}', expected {', '.join(s.name for s in CODEBOOK)}")
        tensor = tensors[spec.name]
        shape = tuple(sizes[axis] if isinstance(axis, str) else axis for axis in spec.shape)
        if tensor.dtype != np.float32 or tensor.shape != shape:
            raise ContractError(f"{where}: '{spec.name}' is {tensor.dtype} {tensor.shape}, expected float32 {shape}")
        if not np.isfinite(tensor).all():
            raise ContractError(f"{where}: '{spec.name}' holds a value that is not finite")
    if (tensors["cluster_radius"] <= 0).any() or tensors["novelty_scale"][0] <= 0:
        raise ContractError(f"{where}: radii and novelty_scale must be greater than 0")
    if (np.diff(tensors["calibration"]) < 0).any():
        raise ContractError(f"{where}: 'calibration' is not sorted")


def read_codebook(path: str | Path, *, model_sha256: str, n_clusters: int, embed_dim: int) -> Codebook:
    """Reads a station codebook and checks that it belongs to the model.

    Raises:
        ModelError: the file cannot be read, or is no codebook.
        ContractError: it was made for another model, or for other K or D.
    """
    path = Path(path)
    try:
        data = path.read_bytes() if path.stat().st_size <= MAX_BYTES else b""
    except OSError as error:
        raise ModelError(f"codebook {path} cannot be read: {error.strerror or error}") from None
    tensors, metadata = _parse(data, f"codebook {path}")
    if metadata.get("contract") != str(CONTRACT):
        raise ContractError(f"codebook {path} has contract {metadata.get('contract')}, expected {CONTRACT}")
    if metadata.get("model_sha256") != model_sha256:
        raise ContractError(
            f"codebook {path} was made for the model {metadata.get('model_sha256', '?')[:12]}, not for {model_sha256[:12]}; "
            f"use the codebook of this model, or none"
        )
    check_codebook(tensors, n_clusters, embed_dim, f"codebook {path}")
    return Codebook(tensors, metadata, hashlib.sha256(data).hexdigest()[:12])


def write_codebook(folder: str | Path, tensors: Tensors, metadata: Mapping[str, str]) -> Path:
    """Writes `<folder>/<sha12>.safetensors`: temporary file, fsync, rename, so that a reader never sees half of one."""
    data = _serialise(tensors, {"contract": str(CONTRACT), **metadata})
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{hashlib.sha256(data).hexdigest()[:12]}.safetensors"
    handle, temporary = tempfile.mkstemp(dir=folder, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except OSError:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def _serialise(tensors: Tensors, metadata: Mapping[str, str]) -> bytes:
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    blobs, offset = [], 0
    for spec in CODEBOOK:
        blob = np.ascontiguousarray(tensors[spec.name], "<f4").tobytes()
        header[spec.name] = {
            "dtype": "F32",
            "shape": list(tensors[spec.name].shape),
            "data_offsets": [offset, offset + len(blob)],
        }
        blobs.append(blob)
        offset += len(blob)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(blobs)


def _parse(data: bytes, where: str) -> tuple[dict[str, NDArray[np.float32]], dict[str, str]]:
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, len(data) - 8):
        raise ModelError(f"{where} is no safetensors file ({len(data)} bytes), or half written")
    try:
        header = json.loads(data[8 : 8 + length])
        metadata = {str(k): str(v) for k, v in header.pop("__metadata__", {}).items()}
        tensors = {}
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            if entry["dtype"] != "F32" or not 0 <= begin <= end <= len(data) - 8 - length:
                raise ValueError(f"tensor {name}")
            tensors[name] = np.frombuffer(data[8 + length + begin : 8 + length + end], "<f4").reshape(entry["shape"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{where} is no safetensors file of float32 tensors, or half written ({error})") from None
    return tensors, metadata
