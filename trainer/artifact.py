"""The run folder: written by fit, read by everything after it (predict, evaluate, report, export). Nothing in it is pickled.

config.yaml          resolved settings             encoder.safetensors    encoder, pixel mean and std
model.json           what was learned from what    codebook.safetensors   projection, centroids, radii, calibration parts, bank
labels.yaml          names and verdicts, editable  metrics.jsonl          one line per epoch, then the result
assignments.csv      one line per image            report.html            one file, offline
autoencoder.safetensors    encoder and decoder as pre-training left them, where there was some
golden/              images the exporter proves its graph on       checkpoints/ while training
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from configs import ConfigError, Settings, load_settings
from trainer.bank.bank import Bank
from trainer.bank.settings import BankSettings
from trainer.codebook import CalibrationParts, set_calibration
from trainer.encoders import ENCODERS
from trainer.errors import ArtifactError
from trainer.model import ClusterModel
from trainer.novelty import NoveltySettings
from trainer.preprocess import Preprocess
from trainer.projection import Projection
from trainer.settings import TrainSettings
from trainer.whole_file import save_tensors, write_whole

SCHEMA = "dkm.run/1"
BANK = "bank."  # in front of its tensors
METRICS, COLLAPSED = (
    "metrics.jsonl",
    "collapsed",
)  # the latter: the stage of the last line where a guard stopped the training
ASSIGNMENT_COLUMNS = ("file", "split", "label", "cluster", "distance", "novelty_score")


class ClusterLabel(Settings):
    """One entry of labels.yaml."""

    name: str | None = Field(None, min_length=1, max_length=60)
    verdict: Literal["pass", "review", "reject"] | None = None


class Labels(Settings):
    """labels.yaml: `clusters: {0: {name: .., verdict: pass | review | reject}}`. No verdict: the line's default applies."""

    clusters: dict[int, ClusterLabel] = Field(default_factory=dict)


@dataclass
class Run:
    """A trained run. `info` is model.json; `run.model.predict(images)` and `run.model.transform(images)` use it."""

    path: Path | None
    settings: TrainSettings
    model: ClusterModel
    parts: CalibrationParts
    info: dict[str, Any]
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def clusters(self) -> list[dict[str, Any]]:
        """The cluster table with the names and verdicts of labels.yaml as it stands now."""
        labels = load_labels(self.path, [row["name"] for row in self.info["clusters"]]) if self.path else Labels()
        rows = []
        for row in self.info["clusters"]:
            label = labels.clusters.get(row["id"], ClusterLabel())
            rows.append(
                {
                    **row,
                    **({"name": label.name} if label.name else {}),
                    **({"verdict": label.verdict} if label.verdict else {}),
                }
            )
        return rows


def build_model(
    settings: TrainSettings, size: tuple[int, int], n_samples: int, n_clusters: int | None = None
) -> ClusterModel:
    """An untrained model for inputs of `size` (height, width); `n_samples` training images bound the projection's size.

    Args:
        n_clusters: where it is not the settings' own: of a trained run whose method finds the number.
    """
    preprocess = Preprocess(settings.preprocess, *size)
    encoder = ENCODERS[settings.encoder.name](settings.encoder, (len(preprocess.mean), *size))
    projection = Projection(settings.projection, encoder.out_dim, n_samples)
    return ClusterModel(preprocess, encoder, projection, n_clusters or settings.method.n_clusters)


def save_run(run: Run, folder: Path, assignments: Sequence[Sequence[object]]) -> None:
    """Writes the files; model.json last, since its presence says that the run is complete. labels.yaml is kept if it is there."""
    folder.mkdir(parents=True, exist_ok=True)
    model = run.model
    save_tensors(
        folder / "encoder.safetensors", _tensors(model.encoder, "encoder.") | _tensors(model.preprocess, "preprocess.")
    )
    codebook = _tensors(model.projection, "projection.") | {
        "centroids": model.centroids.detach(),
        "cluster_mean": model.cluster_mean,
        "cluster_radius": model.cluster_radius,
        "calibration_score": torch.from_numpy(run.parts.score),
        "calibration_cluster": torch.from_numpy(run.parts.cluster),
        "calibration_group": torch.from_numpy(run.parts.group),
    }
    if model.bank is not None:
        codebook |= _tensors(model.bank, BANK)
    save_tensors(folder / "codebook.safetensors", codebook)
    with (folder / "assignments.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([ASSIGNMENT_COLUMNS, *assignments])
    if not (folder / "labels.yaml").exists():
        (folder / "labels.yaml").write_text(_labels_template(run.info["clusters"]), encoding="utf-8")
    run.path = folder
    write_whole(folder / "model.json", json.dumps(run.info, indent=1, allow_nan=False) + "\n")


def write_config(settings: TrainSettings, folder: Path) -> None:
    """config.yaml: the settings as resolved, so that the run can be repeated."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "config.yaml", yaml.safe_dump(settings.plain(), sort_keys=False, allow_unicode=True))


def load_run(path: str | Path, device: str = "cpu") -> Run:
    """Reads a complete run folder.

    Raises:
        ArtifactError: not there, not complete, damaged, or of another schema.
        ConfigError: labels.yaml is wrong.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ArtifactError(f"{folder}: no such run folder; `dkm-train fit` writes one")
    if not (folder / "model.json").is_file():
        raise ArtifactError(f"{folder} is {_incomplete(folder)}")
    try:
        info = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        if info.get("schema") != SCHEMA:
            raise ArtifactError(f"{folder}/model.json has the schema {info.get('schema')}, expected {SCHEMA}")
        settings = load_settings(TrainSettings, folder / "config.yaml", "train")
        encoder, codebook = load_file(folder / "encoder.safetensors"), load_file(folder / "codebook.safetensors")
        size = (info["input"]["height_px"], info["input"]["width_px"])
        model = build_model(settings, size, info["train"]["n_train"], len(codebook["centroids"]))
        _load_tensors(model, encoder, codebook)
        if "bank" in info["novelty"]:
            bank = BankSettings.model_validate(info["novelty"]["bank"]["settings"])
            model.bank = Bank.of(bank, {k.removeprefix(BANK): v for k, v in codebook.items() if k.startswith(BANK)})
    except (OSError, ValueError, KeyError, TypeError, SafetensorError, RuntimeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ArtifactError(f"{folder} is a damaged run: {' '.join(str(error).split())[:200]}") from None
    parts = CalibrationParts(
        codebook["calibration_score"].numpy(),
        codebook["calibration_cluster"].numpy().astype(np.int64),
        codebook["calibration_group"].numpy().astype(np.int64),
        info["novelty"]["kind"] != "uncalibrated",
    )
    set_calibration(model, parts, settings.calibration or NoveltySettings())
    return Run(folder, settings, model.to(device).eval(), parts, info, info.get("metrics", {}))


def _incomplete(folder: Path) -> str:
    """What a folder without model.json is."""
    if not (folder / "config.yaml").is_file():
        return "no run folder (no model.json)"
    try:
        last = json.loads((folder / METRICS).read_text(encoding="utf-8").splitlines()[-1])
    except (OSError, ValueError, IndexError):
        last = {}
    if last.get("stage") == COLLAPSED:
        return (
            f"a run whose training collapsed ({last.get('why')}); it cannot be used: change the settings and fit again"
        )
    return "an unfinished run; `dkm-train fit ... --resume` completes it"


def load_labels(folder: Path, learned: Sequence[str]) -> Labels:
    """labels.yaml of a run; an unknown id, or a name used twice, is an error.

    Args:
        learned: the names (K,) that training gave.

    Raises:
        ConfigError: naming file, line and key.
    """
    path = folder / "labels.yaml"
    if not path.is_file():
        return Labels()
    labels = load_settings(Labels, path, "train")
    unknown = [k for k in labels.clusters if not 0 <= k < len(learned)]
    if unknown:
        raise ConfigError([f"{path} clusters.{unknown[0]}: there is no such cluster, expected 0 to {len(learned) - 1}"])
    names = [labels.clusters.get(k, ClusterLabel()).name or name for k, name in enumerate(learned)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError([f"{path} gives the name '{twice[0]}' to two clusters, expected a name of its own for each"])
    return labels


def _labels_template(clusters: list[dict[str, Any]]) -> str:
    lines = [
        "# Names and verdicts of the clusters; look at report.html, edit, then run dkm-export.",
        "# verdict: pass | review | reject; without one, the line's default applies.",
        "clusters:",
    ]
    lines += [f"  {row['id']}: {{name: {_scalar(row['name'])}}}    # {row['n']} images" for row in clusters]
    return "\n".join(lines) + "\n"


def _scalar(name: str) -> str:
    """A name as YAML reads it back: a class may be called 0, 1e3 or no, or hold a comma."""
    is_plain = re.fullmatch(r"[^\W\d_][\w-]*", name) is not None and yaml.safe_load(name) == name
    return name if is_plain else json.dumps(name, ensure_ascii=False)


def _tensors(module: torch.nn.Module, prefix: str) -> dict[str, Tensor]:
    return {prefix + key: value.detach() for key, value in module.state_dict().items()}


def _load_tensors(model: ClusterModel, encoder: dict[str, Tensor], codebook: dict[str, Tensor]) -> None:
    model.encoder.load_state_dict(
        {k.removeprefix("encoder."): v for k, v in encoder.items() if k.startswith("encoder.")}
    )
    model.projection.load_state_dict(
        {k.removeprefix("projection."): v for k, v in codebook.items() if k.startswith("projection.")}
    )
    with torch.no_grad():
        model.preprocess.mean.copy_(encoder["preprocess.mean"])
        model.preprocess.std.copy_(encoder["preprocess.std"])
        for name in ("centroids", "cluster_mean", "cluster_radius"):
            getattr(model, name).copy_(codebook[name])
