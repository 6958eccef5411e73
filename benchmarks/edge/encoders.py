"""The two networks that this folder measures, as runs on drawn images; their encoders alone; and taking turns while measuring.

ResNet-18 has random weights: time does not depend on them. SqueezeNet has those of ImageNet (`benchmarks/table.py` says where from).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import onnxruntime as ort
import torch

from benchmarks.table import WEIGHTS, real_set
from configs import load_text
from edge_dkm.inspector import Inspector, Runtime
from edge_dkm.paired_runs import paired_ms
from exporters.export import ExportOptions, export_run
from tests.images import write_folder
from trainer import FitOptions, Run, fit
from trainer.settings import TrainSettings

THREADS = 2
SIDE_PX, ROI_PX = 224, 448
PER_KIND = 120  # real pictures of each of seven kinds: fewer are too few for the int8 gate to judge by
SETTINGS = """
data: {{path: {path}}}
preprocess: {{height_px: 224, width_px: 224, normalise: imagenet}}
encoder: {encoder}
projection: {{kind: pca, dim: 64, whiten: 0.25, sqrt: {sqrt}, l2: true}}
method: {{name: ae_kmeans, n_clusters: 8}}
novelty: {{target_frr: 0.1}}
train: {{device: cpu}}
"""
ENCODERS = {
    "ResNet-18": "{name: resnet, trainable: false}",
    "SqueezeNet": f"{{name: pretrained, weights: {WEIGHTS.partition('=')[2]}}}",
}
WARM_UP, RUNS_LEFT_OUT = 20, 3


def run_of(name: str, folder: Path, real: bool = False) -> Run:
    """A run with everything that the graph of a real one has, on 60 drawn images or (`real`) on 777 of x_sdd, made 448x448."""
    images = folder / "images"
    if not images.exists():
        write_steel(images) if real else write_folder(images, side_px=ROI_PX)
    text = SETTINGS.format(path=images, encoder=ENCODERS[name], sqrt=str(name == "SqueezeNet").lower())
    torch.set_num_threads(THREADS)
    return fit(load_text(TrainSettings, text, name), FitOptions(folder / f"run-{name}"))


def write_steel(folder: Path) -> None:
    """Real pictures, since what becomes of novelty in eight bits is no matter of noise."""
    for kind in sorted(path for path in real_set("x_sdd").iterdir() if path.is_dir()):
        (folder / kind.name).mkdir(parents=True)
        for path in sorted(kind.iterdir())[:PER_KIND]:
            image = cv2.resize(cv2.imread(str(path)), (ROI_PX, ROI_PX), interpolation=cv2.INTER_CUBIC)
            cv2.imwrite(str(folder / kind.name / f"{path.stem}.png"), image)


def inspector_of(run: Run, path: Path, options: ExportOptions) -> Inspector:
    """The run exported to `path` and opened."""
    export_run(run, path, options)
    return Inspector(path, runtime=Runtime(threads=THREADS))


def encoder_session(run: Run) -> ort.InferenceSession:
    """The bare encoder at batch 1, with the runtime settings of Inspector; input `x` (1, 3, 224, 224) float32."""
    program = torch.onnx.export(
        run.model.encoder.eval(),
        (torch.zeros(1, 3, SIDE_PX, SIDE_PX),),
        dynamo=True,
        input_names=["x"],
        opset_version=18,
        verbose=False,
    )
    assert program is not None
    return session_of(program.model_proto.SerializeToString())


def session_of(model: bytes, profile: Path | None = None) -> ort.InferenceSession:
    """On the CPU, with the runtime settings of Inspector; `profile`: where onnxruntime writes one."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads, options.inter_op_num_threads = THREADS, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


@dataclass(frozen=True)
class Turns:
    """Milliseconds of each step, round by round."""

    taken: Mapping[str, np.ndarray]

    def median(self, step: str) -> float:
        """Of one step."""
        return float(np.median(self.taken[step]))

    def ratio(self, step: str, other: str) -> float:
        """Median over the rounds of step / other: whatever slows a round slows both."""
        return float(np.median(self.taken[step] / self.taken[other]))

    def adds(self, step: str, other: str) -> float:
        """Median over the rounds of step - other."""
        return float(np.median(self.taken[step] - self.taken[other]))


def in_turns(steps: Mapping[str, Callable[[], object]], rounds: int) -> Turns:
    """One round runs every step once."""
    taken = paired_ms(steps, rounds, WARM_UP)
    return Turns({name: np.array(values) for name, values in taken.items()})


def in_turns_of(runs: int, steps: Mapping[str, Callable[[], object]], rounds: int) -> Turns:
    """One round is the median of some runs of every step, one after the other: each by itself, as on a line.

    For steps with threads of their own: those of the step before wait busily, on the cores that this one needs, when it begins.
    """
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            taken[name].append(float(np.median(paired_ms({name: step}, runs, RUNS_LEFT_OUT)[name])))
    return Turns({name: np.array(values) for name, values in taken.items()})


def frames(width: int, height: int, count: int = 4) -> list[np.ndarray]:
    """Noise, (height, width, 3) uint8."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (height, width, 3), dtype=np.uint8) for _ in range(count)]
