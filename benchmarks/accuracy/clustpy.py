"""MNIST, 5 + 5 epochs, ClustPy's own network and batch: seconds of a whole fit and ACC of both, one after the other in one run.

ClustPy runs in its own environment (`--python`), by the script that times it (`--peer`); ours pays for reading, reports and files too.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.table import SHARED, real_set, show_table
from trainer import FitOptions, fit

NETWORK = [
    "encoder={name: mlp, hidden: [512, 256, 128], dim: 10}",
    "pretrain={epochs: 5, optimizer: {kind: adam, lr: 0.001}}",
    "train.batch_size=256",
]
OURS = {
    "DEC": ("mnist_dec", ["method={name: dec, n_clusters: 10, epochs: 5, optimizer: {kind: adam, lr: 0.0001}}"]),
    "DKM": (
        "mnist_dkm",
        [
            "method={name: dkm, n_clusters: 10, alpha: 1000, rounds: 1, clustering_weight: 0.1, "
            "optimizer: {kind: adam, lr: 0.0001}}"
        ],
    ),
}


def theirs(arguments: argparse.Namespace, method: str) -> dict[str, Any]:
    """The peer script's line."""
    command = [arguments.python, str(arguments.peer), method, str(real_set("mnist.npz"))]
    command += ["--pretrain-epochs", "5", "--epochs", "5", "--threads", str(arguments.threads)]
    command += ["--seed", str(arguments.seed)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def ours(arguments: argparse.Namespace, method: str, precision: str) -> dict[str, float]:
    """Seconds and scores of `fit`."""
    config, changes = OURS[method]
    common = [f"data.path={real_set('mnist.npz')}", f"train.seed={arguments.seed}", f"train.precision={precision}"]
    with tempfile.TemporaryDirectory() as folder:
        started_s = time.perf_counter()
        run = fit(config, FitOptions(Path(folder) / "run", [*common, *NETWORK, *changes]))
        return {"seconds": time.perf_counter() - started_s, **run.metrics}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", default="python", help="of the environment that has clustpy")
    parser.add_argument("--peer", type=Path, default=SHARED / "tools" / "peer_clustpy.py")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    table: list[list[object]] = []
    for method in OURS:
        peer = theirs(arguments, method)
        table.append([method, "ClustPy", f"{peer['seconds']:.0f}", "1.00", peer["acc"], peer["nmi"]])
        for precision in ("fp32", "bf16"):
            own = ours(arguments, method, precision)
            ratio = f"{peer['seconds'] / own['seconds']:.2f}"
            table.append([method, f"ours, {precision}", f"{own['seconds']:.0f}", ratio, own["acc"], own["nmi"]])
    show_table(
        f"MNIST 70,000, 5 + 5 epochs, seed {arguments.seed}", ["method", "by", "s", "times faster", "ACC", "NMI"], table
    )


if __name__ == "__main__":
    main()
