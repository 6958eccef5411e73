"""What the fused graph costs beside the encoder alone, and what `Inspector.inspect` costs beside the session's own run.

ResNet-18 (random weights: time does not depend on them), a 1280x720 frame, ROI 448x448, halved with antialias inside the graph.
`frame to outputs` crops the ROI, makes it contiguous and runs the fused graph; `encoder alone` is a float tensor in, features out,
in the same runtime with the same settings. The two take turns, so a busy machine slows both.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch

from benchmarks.table import show_table
from configs import load_text
from edge_dkm.inspector import FETCHED, Inspector
from exporters.export import export_run
from tests.images import write_folder
from trainer import FitOptions, Run, fit
from trainer.settings import TrainSettings

SETTINGS = """
data: {{path: {path}}}
preprocess: {{height_px: 224, width_px: 224, normalise: imagenet}}
encoder: {{name: resnet, trainable: false}}
projection: {{kind: pca, dim: 64, whiten: 0.25, l2: true}}
method: {{name: ae_kmeans, n_clusters: 8}}
novelty: {{target_frr: 0.1}}
train: {{device: cpu}}
"""
ROUNDS = 200


def resnet_run(folder: Path) -> Run:
    """A run on drawn images, with everything that the graph of a real one has."""
    images = write_folder(folder / "images", 20, side_px=448)
    return fit(load_text(TrainSettings, SETTINGS.format(path=images), "resnet"), FitOptions(folder / "run"))


def encoder_session(run: Run) -> ort.InferenceSession:
    """The bare encoder at batch 1, with the runtime settings of Inspector."""
    program = torch.onnx.export(
        run.model.encoder.eval(),
        (torch.zeros(1, 3, 224, 224),),
        dynamo=True,
        input_names=["x"],
        opset_version=18,
        verbose=False,
    )
    assert program is not None
    options = ort.SessionOptions()
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ort.InferenceSession(program.model_proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def in_turns(steps: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median milliseconds of each step; one round runs every step once."""
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for n in range(ROUNDS + 20):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if n >= 20:
                taken[name].append((time.perf_counter() - started) * 1000)
    return {name: float(np.median(values)) for name, values in taken.items()}


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = resnet_run(folder)
        export_run(run, folder / "part.onnx")
        inspector, encoder = Inspector(folder / "part.onnx"), encoder_session(run)
    rng = np.random.default_rng(0)
    frame = rng.integers(0, 256, (720, 1280, 3), dtype=np.uint8)
    x = rng.standard_normal((1, 3, 224, 224), dtype=np.float32)

    def crop() -> np.ndarray:
        return np.ascontiguousarray(frame[136:584, 416:864])

    roi = crop()
    ms = in_turns(
        {
            "encoder alone": lambda: encoder.run(None, {"x": x}),
            "frame to outputs": lambda: inspector.run(crop()[None], FETCHED),
            "session.run": lambda: inspector._open().run(list(FETCHED), {"image": roi[None]}),
            "Inspector.inspect": lambda: inspector.inspect(roi),
        }
    )
    ratio = ms["frame to outputs"] / ms["encoder alone"]
    added = ms["Inspector.inspect"] - ms["session.run"]
    rows = [[step, value] for step, value in ms.items()]
    rows += [["frame to outputs / encoder alone", f"{ratio:.3f} (asked <= 1.10)"]]
    rows += [["Inspector.inspect adds", f"{added:.3f} ms (asked <= 0.3)"]]
    show_table(f"ResNet-18, 1280x720, ROI 448x448, median of {ROUNDS} rounds, ms", ["step", "ms"], rows)


if __name__ == "__main__":
    main()
