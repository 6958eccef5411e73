"""What the part of an encoder that never trains makes of every image: computed once per fit, and once per set with `pretrain.cache`.

A sweep over methods on pretrained features spends nearly all of its time here otherwise.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from trainer import ranks
from trainer.data import Dataset
from trainer.encoders.weights import with_digests
from trainer.model import PREDICT_BATCH, ClusterModel, evaluating
from trainer.settings import TrainSettings
from trainer.whole_file import save_tensors


@torch.no_grad()
def frozen_features(settings: TrainSettings, model: ClusterModel, dataset: Dataset) -> Tensor | None:
    """Outputs (N, F) of the encoder's frozen part for all images, on the model's device; None where it has none.

    The model is in eval mode, its pre-processing is fitted. A damaged file in the cache is computed again.
    """
    if not model.encoder.has_frozen:
        return None
    path, together = _place(settings, model, dataset), ranks.current()
    found = None if path is None else together.same(lambda: _read(path))
    if found is not None:
        return found.to(model.centroids.device)
    (features,) = model.over_ranks(
        dataset.pixels, PREDICT_BATCH, lambda part: [model.encoder.frozen(model.input_of(part))]
    )
    if path is not None and together.is_first:
        save_tensors(path, {"features": features})
    return features


def _read(path: Path) -> Tensor | None:
    """What lies in the cache; None where there is nothing to use."""
    try:
        return load_file(path)["features"] if path.is_file() else None
    except (SafetensorError, OSError, KeyError):
        path.unlink(missing_ok=True)
        return None


def embeddings(settings: TrainSettings, model: ClusterModel, dataset: Dataset) -> Tensor:
    """Embeddings (N, D) of all images by a trained model of these settings; its frozen part is looked up where `pretrain.cache` has it."""
    with evaluating(model):
        frozen = frozen_features(settings, model, dataset)
    return model.embed_dataset(dataset.pixels) if frozen is None else model.embed_frozen(frozen)


def _place(settings: TrainSettings, model: ClusterModel, dataset: Dataset) -> Path | None:
    """The file of these features in the cache: named by images, pre-processing and its constants, encoder and weights."""
    if settings.pretrain.cache is None:
        return None
    plain = settings.plain()
    encoder = plain["encoder"]
    values = {
        "images": dataset.manifest_sha256,
        "preprocess": plain["preprocess"],
        "constants": [model.preprocess.mean.tolist(), model.preprocess.std.tolist()],
        "frozen": with_digests(encoder.get("backbone", encoder)),
    }
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    return Path(settings.pretrain.cache) / f"features-{digest[:16]}.safetensors"
