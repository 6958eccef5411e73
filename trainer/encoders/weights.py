"""Loads pretrained weights from a local safetensors file into an encoder that takes OpenCV's BGR; called by resnet and pretrained."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from trainer.errors import DataError


def load_weights(
    module: nn.Module, path: str, *, first: str, ignore: tuple[str, ...], own: tuple[str, ...] = ()
) -> None:
    """Copies the file's tensors into `module`.

    Args:
        first: key of the first convolution, whose input channels are turned from RGB to BGR, for free instead of per frame.
        ignore: prefixes in the file that the module does not have (the classifier).
        own: prefixes in the module that the file does not have.

    Raises:
        DataError: the file is missing, unreadable or of another network; the first differing key is named.
    """
    tensors = {key: value for key, value in read_weights(path).items() if not key.startswith(ignore)}
    expected = {
        key: value
        for key, value in module.state_dict().items()
        if not key.startswith(own or ("\0",)) and not key.endswith("num_batches_tracked")
    }
    for key in sorted(set(tensors) ^ set(expected)):
        if not key.endswith("num_batches_tracked"):
            raise DataError(
                f"encoder.weights is {path}, whose key '{key}' is {'not one of' if key in tensors else 'missing for'} {type(module).__name__}"
            )
    first_weight = tensors[first]
    if expected[first].shape[1] == 1:
        tensors[first] = first_weight.sum(1, keepdim=True)
    elif first_weight.shape[1] == 3:
        tensors[first] = first_weight.flip(1)
    for key, value in tensors.items():
        if key in expected and value.shape != expected[key].shape:
            raise DataError(
                f"encoder.weights is {path}, whose '{key}' has the shape {tuple(value.shape)}, expected {tuple(expected[key].shape)}"
            )
    module.load_state_dict(tensors, strict=False)


def with_digests(encoder: Mapping[str, Any]) -> dict[str, Any]:
    """An encoder's plain settings with the sha256 of each weights file in place of its path: what decides features is what it holds."""
    return {
        key: with_digests(value)
        if isinstance(value, Mapping)
        else hashlib.sha256(Path(value).read_bytes()).hexdigest()
        if key == "weights" and value and Path(value).is_file()
        else value
        for key, value in encoder.items()
    }


def read_weights(path: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file; raises DataError where it is not there or no such file."""
    if not Path(path).is_file():
        raise DataError(
            f"encoder.weights is {path}, which does not exist; give the path of a local safetensors file (weights are never downloaded)"
        )
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise DataError(f"encoder.weights is {path}, which is no safetensors file: {error}") from None
