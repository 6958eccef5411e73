"""The training settings: one YAML, composed of the settings that live beside the code they configure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

from pydantic import Field

from configs import Settings
from trainer.augment import AugmentSettings
from trainer.encoders import ENCODERS
from trainer.encoders.base import EncoderSettings
from trainer.images import DataSettings
from trainer.methods import METHODS
from trainer.methods.base import MethodSettings
from trainer.novelty import NoveltySettings
from trainer.precision import Format
from trainer.preprocess import PreprocessSettings
from trainer.pretrain import PretrainSettings
from trainer.projection import ProjectionSettings

if TYPE_CHECKING:
    AnyEncoder = EncoderSettings
    AnyMethod = MethodSettings
else:  # the registries decide at run time what may stand here
    AnyEncoder = Annotated[Union[tuple(encoder.Settings for encoder in ENCODERS.values())], Field(discriminator="name")]  # noqa: UP007
    AnyMethod = Annotated[Union[tuple(method.Settings for method in METHODS.values())], Field(discriminator="name")]  # noqa: UP007


class LoopSettings(Settings):
    """`batch_size` of every stage; `deterministic` gives equal arrays for equal seeds on a CPU.

    `precision: bf16` trains encoder and decoder in bfloat16 (half the time where the processor has it), `fp16` (GPUs only) in half
    precision with a scaled loss; full passes stay float32.
    """

    seed: int = Field(0, ge=0)
    batch_size: int = Field(256, ge=1)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    deterministic: bool = True
    precision: Format = "fp32"
    checkpoint_every_s: float = Field(60.0, ge=0)
    checkpoint_max_mb: float = Field(
        2000.0, gt=0, description="of the folder of checkpoints; a resumed run may change it"
    )


class TrainSettings(Settings):
    """What `dkm-train fit` reads."""

    version: Literal[1] = 1
    data: DataSettings
    preprocess: PreprocessSettings = PreprocessSettings()
    augment: AugmentSettings = AugmentSettings()
    encoder: AnyEncoder
    projection: ProjectionSettings = ProjectionSettings()
    pretrain: PretrainSettings = PretrainSettings()
    method: AnyMethod
    train: LoopSettings = LoopSettings()
    novelty: NoveltySettings | Literal["none"] = NoveltySettings()

    @property
    def calibration(self) -> NoveltySettings | None:
        """The novelty settings, or None where novelty is off."""
        return None if self.novelty == "none" else self.novelty

    def plain(self) -> dict[str, Any]:
        """As YAML and JSON take it."""
        return self.model_dump(mode="json", by_alias=True)
