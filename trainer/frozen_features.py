"""What the part of an encoder that never trains makes of every image: computed once per fit, and once per set with `pretrain.cache`.

A sweep over methods on pretrained features spends nearly all of its time here otherwise.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from trainer.data import Dataset
from trainer.model import PREDICT_BATCH, ClusterModel
from trainer.settings import TrainSettings
from trainer.splits import Split


@torch.no_grad()
def frozen_features(settings: TrainSettings, model: ClusterModel, dataset: Dataset, split: Split) -> Tensor | None:
    """Outputs (N, ...) of the encoder's stem for all images, on the model's device; None where it has no stem.

    The model is in eval mode, its pre-processing and stem are fitted. A damaged file in the cache is computed again.
    """
    if not model.encoder.has_stem:
        return None
    device = model.centroids.device
    path = _place(settings, model, dataset, split)
    if path is not None and path.is_file():
        try:
            return load_file(path)["features"].to(device)
        except (SafetensorError, OSError, KeyError):
            path.unlink(missing_ok=True)
    batches = (model.preprocess.normalise(part.to(device)) for part in dataset.pixels.split(PREDICT_BATCH))
    features = torch.cat([model.encoder.stem(batch) for batch in batches])
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        save_file({"features": features.cpu().contiguous()}, temporary)
        temporary.replace(path)
    return features


def _place(settings: TrainSettings, model: ClusterModel, dataset: Dataset, split: Split) -> Path | None:
    """The file of these features in the cache: named by images, pre-processing, encoder, and the images that its stem was fitted on."""
    if settings.pretrain.cache is None:
        return None
    plain = settings.plain()
    values = {
        "images": dataset.manifest_sha256,
        "preprocess": plain["preprocess"],
        "constants": [model.preprocess.mean.tolist(), model.preprocess.std.tolist()],
        "encoder": plain["encoder"],
        "fitted_on": hashlib.sha256(np.ascontiguousarray(split.train).tobytes()).hexdigest(),
    }
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    return Path(settings.pretrain.cache) / f"features-{digest[:16]}.safetensors"
