"""Reads a model file once: the bytes whose digest is checked are the bytes that are loaded. Says what a wrong file is.

A damaged graph may load and answer wrongly (measured: one mutation in four), so the digest beside it is compared whenever it is there.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

from edge_dkm.errors import ModelError

MAX_BYTES = 2_000_000_000
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelFile:
    """`name` is for messages; `checked` tells whether a digest file was there and agreed."""

    name: str
    data: bytes
    sha256: str
    checked: bool
    path: Path | None


def golden_path(model: Path) -> Path:
    """`<model>.golden.npz`."""
    return model.with_name(model.name + ".golden.npz")


def digest_path(model: Path) -> Path:
    """`<model>.sha256`."""
    return model.with_name(model.name + ".sha256")


def read_model(model: str | Path | bytes) -> ModelFile:
    """Reads and checks a model file; bytes are taken as they are (their digest is the caller's business).

    Raises:
        ModelError: not there, a folder, empty, a web page, a Git-LFS pointer, or not the bytes its digest file names.
    """
    if isinstance(model, bytes):
        return ModelFile("model", model, hashlib.sha256(model).hexdigest(), checked=False, path=None)
    path = Path(model)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ModelError(f"{path} has {path.stat().st_size} bytes, expected at most {MAX_BYTES}")
        data = path.read_bytes()
    except FileNotFoundError:
        raise ModelError(f"{path}: no such model; `dkm-export RUN -o {path}` writes one") from None
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}") from None
    _refuse_lookalikes(path, data)
    digest = hashlib.sha256(data).hexdigest()
    return ModelFile(path.name, data, digest, _digest_agrees(path, digest), path)


def _refuse_lookalikes(path: Path, data: bytes) -> None:
    start = data[:512].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if not data:
        raise ModelError(f"{path} is empty, expected an ONNX model")
    if start.startswith(b"version https://git-lfs"):
        raise ModelError(f"{path} is a Git-LFS pointer of {len(data)} bytes, not the model; run `git lfs pull`")
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise ModelError(f"{path} is a web page of {len(data)} bytes, not a model; download the file itself")
    if start.startswith(b"pk\x03\x04") or start.startswith(b"\x80\x02") or start.startswith(b"\x80\x04"):
        raise ModelError(
            f"{path} is a zip or pickle file (a PyTorch checkpoint?), expected an ONNX model written by dkm-export"
        )


def _digest_agrees(path: Path, digest: str) -> bool:
    try:
        words = digest_path(path).read_text(encoding="ascii", errors="replace").split()
    except OSError:
        log.warning("%s has no digest file %s beside it; damage cannot be noticed", path, digest_path(path).name)
        return False
    if not words or words[0] != digest:
        raise ModelError(
            f"{path} has the sha256 {digest[:12]}..., but {digest_path(path).name} names "
            f"{words[0][:12] if words else 'nothing'}...; the model is damaged, half copied or edited: copy both files again"
        )
    return True
