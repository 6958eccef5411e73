"""Image encoders, one per file; `ENCODERS` maps the name in YAML to the class. Adding one: a file, and a line here."""

from __future__ import annotations

from trainer.encoders.base import Encoder
from trainer.encoders.conv import ConvEncoder
from trainer.encoders.feature_mlp import FeatureMLPEncoder
from trainer.encoders.mlp import MLPEncoder
from trainer.encoders.pretrained import PretrainedEncoder
from trainer.encoders.resnet import ResNetEncoder

ENCODERS: dict[str, type[Encoder]] = {
    "mlp": MLPEncoder,
    "conv": ConvEncoder,
    "resnet": ResNetEncoder,
    "pretrained": PretrainedEncoder,
    "feature_mlp": FeatureMLPEncoder,
}

__all__ = ["ENCODERS", "Encoder"]
