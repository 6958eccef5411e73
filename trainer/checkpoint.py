"""Saves and restores the state of a training run, so that a resumed run ends as an uninterrupted one. Safetensors, never a pickle."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trainer.errors import ArtifactError
from trainer.learner import Learner
from trainer.methods.base import Method
from trainer.whole_file import save_tensors

NAME = "last.safetensors"


@dataclass(frozen=True)
class Position:
    """Where in the run the checkpoint stands: the next step of stage number `stage`, and what the data and settings were."""

    stage: int
    step: int
    config_sha256: str
    manifest_sha256: str


def save_checkpoint(
    folder: Path, position: Position, learner: Learner, method: Method, optimizer: torch.optim.Optimizer
) -> None:
    """Writes `folder/last.safetensors`."""
    tensors = {f"model.{k}": v for k, v in learner.model.state_dict().items()}
    if learner.decoder is not None:
        tensors |= {f"decoder.{k}": v for k, v in learner.decoder.state_dict().items()}
    tensors |= {f"method.{k}": v for k, v in method.state().items()}
    for n, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{n}.{k}": v for k, v in state.items() if isinstance(v, Tensor)}
    save_tensors(folder / NAME, tensors, {"position": json.dumps(position.__dict__)})


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory; `restore` puts it into freshly built objects."""

    position: Position
    tensors: dict[str, Tensor]

    def restore(self, learner: Learner, method: Method) -> None:
        """Model, decoder and method; the optimizer follows once its stage has built it."""
        learner.model.load_state_dict(self._part("model"))
        if learner.decoder is not None:
            learner.decoder.load_state_dict(self._part("decoder"))
        method.load_state(self._part("method"))

    def restore_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Moments and step counts."""
        state: dict[int, dict[str, Any]] = {}
        for key, value in self._part("optimizer").items():
            n, _, name = key.partition(".")
            state.setdefault(int(n), {})[name] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})

    def _part(self, name: str) -> dict[str, Tensor]:
        return {
            key.removeprefix(f"{name}."): value for key, value in self.tensors.items() if key.startswith(f"{name}.")
        }


def load_checkpoint(folder: Path, config_sha256: str, manifest_sha256: str) -> Checkpoint | None:
    """The checkpoint in `folder`, or None where there is none.

    Raises:
        ArtifactError: it is damaged, or belongs to other settings or other images.
    """
    path = folder / NAME
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            position = Position(**json.loads(file.metadata()["position"]))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}); delete it to start again") from None
    if position.config_sha256 != config_sha256:
        raise ArtifactError(
            f"{path} was written with other settings (sha256 {position.config_sha256[:12]}, now {config_sha256[:12]}); "
            f"resume with the same ones, or choose another --out"
        )
    if position.manifest_sha256 != manifest_sha256:
        raise ArtifactError(
            f"{path} was written for other images (manifest {position.manifest_sha256[:12]}, now {manifest_sha256[:12]}); "
            f"restore the data, or choose another --out"
        )
    return Checkpoint(position, tensors)
