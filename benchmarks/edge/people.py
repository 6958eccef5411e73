"""`Inspector` with SqueezeNet against what people write: OpenCV to scale, PyTorch to encode, scikit-learn to predict.

Both begin with a 448x448 BGR frame and end with a cluster id; ours has the novelty, the p-value and all distances besides. Theirs:
cv2.resize (INTER_AREA) to 224, BGR to RGB, ImageNet's normalisation, the encoder in eager mode under inference_mode, the features to
numpy, KMeans.predict (K = 8). Two threads each, the three in turns of some runs.

python -m benchmarks.edge.people [--rounds N]
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits

from benchmarks.edge.encoders import ROI_PX, SIDE_PX, THREADS, frames, in_turns_of
from benchmarks.edge.int8 import pair
from benchmarks.table import show_table
from trainer import Run, load_run

ROUNDS, RUNS = 30, 15
ASKED = {"Inspector fp32": "2.5; moonshot 3", "Inspector int8": "4.5; moonshot 6"}
THEIRS = "OpenCV, PyTorch, scikit-learn"
MEAN, STD = (np.array(v, np.float32) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def what_people_write(run: Run) -> Callable[[np.ndarray], int]:
    """A function from a BGR frame to a cluster id."""
    encoder = run.model.encoder.eval()

    def features(frame: np.ndarray) -> np.ndarray:
        small = cv2.resize(frame, (SIDE_PX, SIDE_PX), interpolation=cv2.INTER_AREA)
        rgb = cv2.cvtColor(small, cv2.COLOR_BGR2RGB).astype(np.float32) / 255
        x = torch.from_numpy(((rgb - MEAN) / STD).transpose(2, 0, 1)[None])
        with torch.inference_mode():
            return encoder(x).numpy()

    kmeans = KMeans(8, n_init=1, random_state=0).fit(np.concatenate([features(f) for f in frames(ROI_PX, ROI_PX, 40)]))
    return lambda frame: int(kmeans.predict(features(frame))[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    rounds = parser.parse_args().rounds
    cv2.setNumThreads(THREADS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        both = pair("SqueezeNet", folder)
        theirs = what_people_write(load_run(folder / "run-SqueezeNet"))
    torch.set_num_threads(THREADS)
    images = itertools.cycle(frames(ROI_PX, ROI_PX))
    ours = {"Inspector fp32": both.fp32, "Inspector int8": both.int8}
    steps: dict[str, Callable[[], object]] = {THEIRS: lambda: theirs(next(images))}
    steps |= {name: lambda m=model: m.inspect(next(images)) for name, model in ours.items()}
    with threadpool_limits(THREADS):
        turns = in_turns_of(RUNS, steps, rounds)
    rows: list[list[object]] = [[THEIRS, turns.median(THEIRS), 1.0, ""]]
    rows += [[step, turns.median(step), turns.ratio(THEIRS, step), f">= {ASKED[step]}"] for step in ours]
    title = f"SqueezeNet, 448x448 BGR frame to cluster, {rounds} rounds of {RUNS} runs, two threads"
    print(f"\nint8 graph {both.verdict}")
    show_table(title, ["way", "ms", "times faster", "asked"], rows)


if __name__ == "__main__":
    main()
