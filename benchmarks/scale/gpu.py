"""The figures that need a GPU: DEC on MNIST end to end with the share of time the GPU is busy; k-means of ten million points. Without one, says so.

python -m benchmarks.scale.gpu [--pretrain-epochs 100] [--epochs 150] [--rows 10000000]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.table import real_set, show_table
from trainer import FitOptions, fit
from trainer.clustering.kmeans import KMeansOptions, kmeans

DIM, CLUSTERS, ITERATIONS = 128, 10_000, 20


class Busy:
    """The share of time in which the GPU had work, as the driver counts it, while this is entered; None where it does not tell."""

    share: float | None = None

    def __enter__(self) -> Busy:
        words = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "200", "-i", "0"]
        try:
            self._process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        except OSError:
            self._process = None
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is None:
            return
        self._process.terminate()
        found = [int(line) for line in self._process.communicate()[0].split() if line.isdigit()]
        self.share = sum(found) / len(found) / 100 if found else None


def dec(precision: str, arguments: argparse.Namespace) -> list[object]:
    """DEC on MNIST by `fit`, from the file to the report."""
    changes = [
        f"data.path={real_set('mnist.npz')}",
        f"pretrain={{epochs: {arguments.pretrain_epochs}, optimizer: {{kind: adam, lr: 0.001}}}}",
        f"method={{name: dec, n_clusters: 10, epochs: {arguments.epochs}, tol: 0, optimizer: {{kind: adam, lr: 0.0001}}}}",
        f"train={{device: cuda, precision: {precision}}}",
    ]
    with tempfile.TemporaryDirectory() as folder, Busy() as busy:
        started_s = time.perf_counter()
        run = fit("mnist_dec", FitOptions(Path(folder) / "run", changes))
        seconds = time.perf_counter() - started_s
    share = "unknown" if busy.share is None else f"{busy.share:.0%}"
    return [f"DEC on MNIST, {precision}", f"{seconds:.1f}", share, f"{_peak_gb():.1f}", f"ACC {run.metrics['acc']:.3f}"]


def points(rows: int) -> torch.Tensor:
    """(rows, DIM) around as many centres as there are clusters."""
    generator = torch.Generator("cuda").manual_seed(0)
    centres = torch.randn(CLUSTERS, DIM, generator=generator, device="cuda")
    own = torch.randint(CLUSTERS, (rows,), generator=generator, device="cuda")
    return torch.randn(rows, DIM, generator=generator, device="cuda").add_(centres[own])


def clustering(rows: int) -> list[object]:
    """k-means of points that lie on the GPU."""
    z = points(rows)
    torch.cuda.reset_peak_memory_stats()
    with Busy() as busy:
        started_s = time.perf_counter()
        found = kmeans(z, CLUSTERS, 0, KMeansOptions(n_init=1, max_iterations=ITERATIONS, tol=0.0, init="random"))
        torch.cuda.synchronize()
        seconds = time.perf_counter() - started_s
    share = "unknown" if busy.share is None else f"{busy.share:.0%}"
    title = f"k-means, {rows} x {DIM}, K {CLUSTERS}, {found.iterations} iterations"
    return [title, f"{seconds:.1f}", share, f"{_peak_gb():.1f}", f"inertia per point {found.inertia / rows:.1f}"]


def _peak_gb() -> float:
    return torch.cuda.max_memory_allocated() / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pretrain-epochs", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=150)
    parser.add_argument("--precisions", nargs="+", default=["bf16", "fp32"])
    parser.add_argument("--rows", type=int, default=10_000_000)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit(
            "this PyTorch sees no CUDA device; these figures need one (benchmarks.scale.resnet also runs on a CPU)"
        )
    table = [dec(precision, arguments) for precision in arguments.precisions]
    torch.cuda.empty_cache()
    table.append(clustering(arguments.rows))
    title = f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}"
    show_table(title, ["", "s", "GPU busy", "peak GB", ""], table)


if __name__ == "__main__":
    main()
