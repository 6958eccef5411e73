"""Saves and restores the state of a training run, so that a resumed run ends as an uninterrupted one. Safetensors, never a pickle.

`checkpoints/` in the run folder holds the newest, last.safetensors, and the one before it, previous.safetensors. A new one is written
beside them and synced before `last` is renamed to `previous` and the new one to `last`: whenever the process is killed, one of the two is whole.

Either may have been saved while the clusters were collapsing, before a guard looked again. So the one that a later look found sound is also
kept as good.safetensors, another name of the same file, and takes the place of both once a guard has stopped the run.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from trainer.errors import ArtifactError
from trainer.learner import Learner
from trainer.methods.base import Method
from trainer.whole_file import link_whole, remove_unfinished, write_whole

FOLDER, NAME, PREVIOUS, GOOD = "checkpoints", "last.safetensors", "previous.safetensors", "good.safetensors"
MB = 1_000_000
SPARE_BYTES = 1 * MB  # that stay free on the disk, for the log
# They decide when is saved, and who decodes where to: not what is learned.
FREE_TO_CHANGE = {
    "train": ("checkpoint_every_s", "checkpoint_max_mb"),
    "data": ("workers", "memory", "ram_share", "scratch"),
}


@dataclass(frozen=True)
class Position:
    """Where in the run the checkpoint stands: the next step of stage number `stage`, and what the data and settings were.

    `loss_sum`: of the steps of the epoch that are done.
    """

    stage: int
    step: int
    config_sha256: str
    manifest_sha256: str
    name: str = ""
    loss_sum: float = 0.0

    def __str__(self) -> str:
        return f"stage {self.name or self.stage}, step {self.step}"


def has_checkpoint(run: Path) -> bool:
    """Whether the run folder holds one."""
    return any((run / FOLDER / name).is_file() for name in (NAME, PREVIOUS, GOOD))


def remove_checkpoints(run: Path) -> None:
    """Of a run that is complete."""
    for name in (GOOD, PREVIOUS, NAME):
        remove_unfinished(run / FOLDER / name)
        (run / FOLDER / name).unlink(missing_ok=True)


def leave_good_checkpoint(run: Path) -> None:
    """After a collapse: where one is known to be good, it becomes the last, and those from within the collapse go."""
    folder = run / FOLDER
    if (folder / GOOD).is_file():
        (folder / PREVIOUS).unlink(missing_ok=True)
        link_whole(folder / GOOD, folder / NAME)


def settings_digest(plain: Mapping[str, Any]) -> str:
    """sha256 of settings as `TrainSettings.plain` gives them, without what a resumed run may change."""
    kept = {
        section: {key: value for key, value in plain[section].items() if key not in free}
        for section, free in FREE_TO_CHANGE.items()
    }
    return hashlib.sha256(json.dumps({**plain, **kept}, sort_keys=True).encode()).hexdigest()


def training_state(learner: Learner, method: Method, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All tensors that a checkpoint keeps."""
    tensors = {f"model.{k}": v for k, v in learner.model.state_dict().items()}
    if learner.decoder is not None:
        tensors |= {f"decoder.{k}": v for k, v in learner.decoder.state_dict().items()}
    tensors |= {f"method.{k}": v for k, v in method.state().items()}
    tensors |= {f"precision.{k}": v for k, v in learner.precision.state().items()}
    for n, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{n}.{k}": v for k, v in state.items() if isinstance(v, Tensor)}
    return tensors


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory; `restore` puts it into freshly built objects."""

    position: Position
    tensors: dict[str, Tensor]

    def restore(self, learner: Learner, method: Method) -> None:
        """Model, decoder and method; the optimizer follows once its stage has built it.

        Raises:
            ArtifactError: it lacks something, so another version of this program wrote it.
        """
        try:
            learner.model.load_state_dict(self._part("model"))
            if learner.decoder is not None:
                learner.decoder.load_state_dict(self._part("decoder"))
            method.load_state(self._part("method"))
            learner.precision.load_state(self._part("precision"))
        except KeyError as error:
            raise ArtifactError(
                f"the checkpoint ({self.position}) lacks {error}: another version of this program wrote it; choose another --out"
            ) from None

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


class Checkpoints:
    """The checkpoints of one run. What cannot be saved stops no training: it is said once, and again when saving works.

    `every_s`: between two of them, at least. `max_mb` is of the whole folder, the file being written included: where four files do not
    fit, the good one is not kept, where three do not, the previous one, and where two do not, nothing is saved. `newest`: what a resumed
    run would go on from.
    """

    def __init__(self, run: Path, every_s: float, max_mb: float, say: Callable[[str], None]) -> None:
        self.folder, self.every_s, self.max_mb, self._say = run / FOLDER, every_s, max_mb, say
        self.newest: Position | None = None
        self._problem: str | None = None
        self._tried_s = time.monotonic()
        self._said: set[str] = set()
        self._is_last_whole = False  # a damaged one must not take the place of the previous one
        self._is_last_open = False  # whether `vouch` has not been called for it

    @property
    def are_due(self) -> bool:
        """Whether it is time for the next one."""
        return time.monotonic() - self._tried_s >= self.every_s

    @property
    def outcome(self) -> str:
        """What came of the last `save`, for who stops now."""
        if self._problem is None:
            return "the checkpoint is saved"
        earlier = "which starts from the beginning" if self.newest is None else f"which goes back to {self.newest}"
        return f"nothing could be saved ({self._problem}), {earlier}"

    def save(self, position: Position, tensors: Mapping[str, Tensor]) -> bool:
        """Writes last.safetensors; returns whether it did."""
        self._tried_s = time.monotonic()
        need = sum(value.numel() * value.element_size() for value in tensors.values())
        try:
            self._problem = self._write(position, tensors, need)
        except OSError as error:
            self._problem = (
                f"{error.strerror or error}: a checkpoint needs {need / MB:.3g} MB at {self.folder}, {self._free()}"
            )
        if self._problem is None:
            if "problem" in self._said:
                self._said.remove("problem")
                self._say(f"checkpoints can be saved again; this one is of {position}")
            self.newest, self._is_last_whole, self._is_last_open = position, True, self._fit(4, need)
            return True
        earlier = "there is none yet" if self.newest is None else f"the last one is of {self.newest}"
        self._say_once("problem", f"no checkpoint at {position}: {self._problem}; training goes on, {earlier}")
        return False

    def vouch(self) -> None:
        """The guards have looked since the last checkpoint was saved, and found the run sound: that one is good."""
        if not self._is_last_open:
            return
        self._is_last_open = False
        link_whole(self.folder / NAME, self.folder / GOOD)

    def load(self, config_sha256: str, manifest_sha256: str) -> Checkpoint | None:
        """The newest whole checkpoint, or None where there is none; a damaged one is said.

        Raises:
            ArtifactError: all are damaged, or it belongs to other settings or other images.
        """
        damaged: list[str] = []
        for path in (self.folder / NAME, self.folder / PREVIOUS, self.folder / GOOD):
            remove_unfinished(path)
            if not path.is_file():
                continue
            try:
                checkpoint = _read(path)
            except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
                damaged.append(f"{path} cannot be read ({error})")
                with contextlib.suppress(OSError):
                    if (self.folder / GOOD).samefile(path):  # damaged as well, and must not replace a whole one
                        (self.folder / GOOD).unlink()
                continue
            _check_origin(path, checkpoint.position, config_sha256, manifest_sha256)
            if damaged:
                self._say(f"{damaged[0]}; going on from the checkpoint before it, {checkpoint.position}")
            self.newest = checkpoint.position
            self._is_last_whole = self._is_last_open = path.name == NAME
            return checkpoint
        if damaged:
            raise ArtifactError(f"{'; '.join(damaged)}; delete {self.folder} to start again")
        return None

    def _write(self, position: Position, tensors: Mapping[str, Tensor], need: int) -> str | None:
        """Why it must not be done; None when it is done."""
        if not self._fit(2, need):
            return (
                f"a checkpoint has {need / MB:.3g} MB, and two (the last one stays until the new one is whole) are more than "
                f"train.checkpoint_max_mb, {self.max_mb:g}"
            )
        if not all(bool(torch.isfinite(v).all()) for k, v in tensors.items() if k.startswith("model.")):
            return "the model holds values that are not finite"
        self.folder.mkdir(parents=True, exist_ok=True)
        path, previous = self.folder / NAME, self.folder / PREVIOUS
        remove_unfinished(path)
        keeps_two = self._fit(3, need)
        if not self._fit(4, need):
            (self.folder / GOOD).unlink(missing_ok=True)
        if not keeps_two:
            if self._is_last_whole:  # else the one before it is all there is, until the new one is written
                previous.unlink(missing_ok=True)
            self._say_once(
                "one",
                f"a checkpoint has {need / MB:.3g} MB, train.checkpoint_max_mb is {self.max_mb:g}: only the last one is kept",
            )
        if shutil.disk_usage(self.folder).free < need + SPARE_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        content = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        place = json.dumps(position.__dict__)
        header = {"position": place, "sha256": _digest(place, content)}
        write_whole(path, save(content, header), previous if keeps_two and self._is_last_whole else None)
        return None

    def _fit(self, files: int, need: int) -> bool:
        """Whether so many files of `need` bytes may lie in the folder."""
        return files * need <= self.max_mb * MB

    def _free(self) -> str:
        try:
            return f"{shutil.disk_usage(self.folder).free / MB:.3g} MB are free"
        except OSError as error:
            return f"which cannot be looked at ({error.strerror})"

    def _say_once(self, what: str, text: str) -> None:
        if what not in self._said:
            self._said.add(what)
            self._say(text)


def _read(path: Path) -> Checkpoint:
    """The checkpoint at `path`; any of several errors where it is not as it was written."""
    with safe_open(path, "pt") as file:
        header = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
    if _digest(header["position"], tensors) != header["sha256"]:
        raise ValueError("its contents are not what was written")
    return Checkpoint(Position(**json.loads(header["position"])), tensors)


def _digest(place: str, tensors: Mapping[str, Tensor]) -> str:
    """sha256 of position and tensors; safetensors itself does not look at what they hold."""
    digest = hashlib.sha256(place.encode())
    for key in sorted(tensors):
        value = tensors[key]
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_origin(path: Path, position: Position, config_sha256: str, manifest_sha256: str) -> None:
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
