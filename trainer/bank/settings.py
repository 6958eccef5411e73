"""Settings of a bank: what it looks at, how the ordinary is learned, how a map becomes one score."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from configs import Settings

Learner = Literal["kmeans", "stochastic_quantization", "coreset", "sample", "gaussian"]
Reduction = Literal["max", "top", "mean"]


class BankSettings(Settings):
    """`cells: patches` looks at every cell of the feature maps, `cells: image` at means and deviations over the whole image.

    `stride` 2 takes every other cell. `unit` takes the strength out of an image's means and deviations and leaves their kind.
    `layers` are maps of the encoder; the finest of them gives the grid. `whiten` .5 makes every direction count alike.
    `learn`: `size` centres by kmeans, stochastic_quantization, as a coreset or a random sample; or a `gaussian` for each place, for parts that lie alike, with
    `regularise` times the identity added to its covariance and moments shared with the places `smooth` cells around.
    `neighbours` and `local` (distances in radii of their own centres), `per_cluster` (a cell is compared with the centres of its image's
    cluster alone) and `min_groups` (a centre must be known from so many groups, so that one defect among the good parts makes none) are for
    centres. `max_cost`: multiply-adds of the bank as a share of the encoder's. `weight`: the patch_score of an ordinary part, where the
    embedding's is 1: with 2 the embedding speaks only for what is far from everything. `reduce`: the map's maximum, the mean of its
    `top_share`, or its mean.
    """

    cells: Literal["patches", "image"] = "patches"
    layers: tuple[str, ...] = Field(("fire8", "fire9"), min_length=1)
    stride: int = Field(1, ge=1, le=4)
    unit: bool = True
    dim: int = Field(128, ge=1, le=128)
    whiten: float = Field(0.5, ge=0, le=0.5)
    learn: Learner = "kmeans"
    size: int = Field(512, ge=1, le=16_384)
    neighbours: int = Field(1, ge=1, le=32)
    local: bool = False
    per_cluster: bool = False
    min_groups: int = Field(1, ge=1)
    regularise: float = Field(0.05, gt=0, le=10)
    smooth: int = Field(0, ge=0, le=4)
    max_cost: float = Field(0.2, gt=0, le=10)
    weight: float = Field(2.0, ge=1, le=10)
    reduce: Reduction = "max"
    top_share: float = Field(0.1, gt=0, le=1)
    blur: int = Field(
        0, ge=0, le=8, description="means of 3x3 cells over novelty_map, for people; patch_score is taken before"
    )

    @model_validator(mode="after")
    def _fits(self) -> BankSettings:
        if len(set(self.layers)) < len(self.layers):
            raise ValueError(f"layers are {', '.join(self.layers)}, expected each once")
        if self.learn == "gaussian" and (self.cells == "image" or self.per_cluster or self.local):
            raise ValueError(
                "learn: gaussian describes each place of the image, expected cells: patches, per_cluster: false and local: false"
            )
        return self
