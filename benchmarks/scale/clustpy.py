"""DEC and DKM on MNIST beside ClustPy: its network, batch, optimizers and epochs, no stopping; seconds and ACC of both, in turns.

    python -m benchmarks.scale.clustpy --python VENV/bin/python                              # 100 + 150 epochs: hours
    python -m benchmarks.scale.clustpy --python VENV/bin/python --pretrain-epochs 10 --epochs 15

ClustPy runs in an environment of its own (`--python`, or EDGE_DKM_CLUSTPY_PYTHON), by the script that times it (`--peer`), which counts its
`fit` alone. Ours is the whole of `fit`: reading the images, the report and the files too. Differs: its DEC takes the target of each batch
from that batch, ours from all images twice an epoch; its labels are of a fresh k-means at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.table import SHARED, real_set, show_table
from trainer import FitOptions, fit

PYTHON = "EDGE_DKM_CLUSTPY_PYTHON"
ADAM = "optimizer: {kind: adam, lr: 0.0001}"


def ours(method: str, precision: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds and scores of `fit`."""
    epochs, rounds = arguments.epochs, arguments.epochs // min(5, arguments.epochs)
    methods = {
        "DEC": f"{{name: dec, n_clusters: 10, epochs: {epochs}, tol: 0, {ADAM}}}",
        "DKM": f"{{name: dkm, n_clusters: 10, alpha: 1000, rounds: {rounds}, epochs_per_alpha: {epochs // rounds}, "
        f"clustering_weight: 0.1, {ADAM}}}",
    }
    changes = [
        f"data.path={real_set('mnist.npz')}",
        "encoder={name: mlp, hidden: [500, 500, 2000], dim: 10, negative_slope: 0.01}",
        f"pretrain={{epochs: {arguments.pretrain_epochs}, optimizer: {{kind: adam, lr: 0.001}}}}",
        f"method={methods[method]}",
        f"train={{batch_size: 256, seed: {arguments.seed}, precision: {precision}, device: cpu}}",
    ]
    with tempfile.TemporaryDirectory() as folder:
        started_s = time.perf_counter()
        run = fit(f"mnist_{method.lower()}", FitOptions(Path(folder) / "run", changes))
        return {"seconds": time.perf_counter() - started_s, **run.metrics}


def theirs(method: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The peer script's line."""
    command = [arguments.python, str(arguments.peer), method, str(real_set("mnist.npz"))]
    command += ["--pretrain-epochs", str(arguments.pretrain_epochs), "--epochs", str(arguments.epochs)]
    command += ["--threads", str(arguments.threads), "--seed", str(arguments.seed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr.strip()[-500:]}")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def rows(method: str, arguments: argparse.Namespace) -> list[list[object]]:
    """ClustPy between ours, so that a machine that grows slower favours nobody."""
    first, *others = arguments.precisions
    found = {first: ours(method, first, arguments)}
    peer = theirs(method, arguments)
    found |= {precision: ours(method, precision, arguments) for precision in others}
    table: list[list[object]] = [[method, "ClustPy", f"{peer['seconds']:.0f}", "1.00", peer["acc"], peer["nmi"]]]
    for precision, own in found.items():
        ratio = f"{peer['seconds'] / own['seconds']:.2f}"
        table.append([method, f"ours, {precision}", f"{own['seconds']:.0f}", ratio, own["acc"], own["nmi"]])
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=os.environ.get(PYTHON), help=f"of ClustPy's environment; default ${PYTHON}")
    parser.add_argument("--peer", type=Path, default=SHARED / "tools" / "peer_clustpy.py")
    parser.add_argument("--methods", nargs="+", default=["DEC", "DKM"], choices=["DEC", "DKM"])
    parser.add_argument("--precisions", nargs="+", default=["bf16", "fp32"], choices=["bf16", "fp32"])
    parser.add_argument("--pretrain-epochs", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=150, help="at most 4, or a multiple of 5")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.epochs > 4 and arguments.epochs % 5:
        parser.error(f"--epochs is {arguments.epochs}, expected at most 4, or a multiple of 5")
    if not arguments.python or not arguments.peer.exists():
        sys.exit(f"needs a Python that has clustpy (--python or {PYTHON}) and {arguments.peer}, which times it")
    torch.set_num_threads(arguments.threads)
    table = [row for method in arguments.methods for row in rows(method, arguments)]
    title = f"MNIST 70,000, {arguments.pretrain_epochs} + {arguments.epochs} epochs, {arguments.threads} threads, seed {arguments.seed}"
    show_table(title, ["method", "by", "s", "times faster", "ACC", "NMI"], table)


if __name__ == "__main__":
    main()
