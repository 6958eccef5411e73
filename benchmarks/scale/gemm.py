"""How much of the machine's matrix product rate one pre-training epoch reaches: MNIST, d-500-500-2000-10 and back, batch 256.

    OMP_NUM_THREADS=2 python -m benchmarks.scale.gemm [--images N] [--epochs N] [--batch N]

The rate is that of a large square product, by PyTorch's default library or oneDNN, whichever is faster; the products of the layers alone, as
large as they are here, show what no loop could better. All are measured again around each epoch, since a shared machine is not always as fast.
FLOPs: 6 x weights x images, less 2 x those of the first layer, whose input needs no gradient.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from benchmarks.scale.epoch_times import EpochTimes, images, pretrain
from benchmarks.table import real_set, show_table

WIDTHS, SQUARE = (784, 500, 500, 2000, 10), 2048
LAYERS = [*pairwise(WIDTHS), *pairwise(WIDTHS[::-1])]
FLOPS_PER_IMAGE = 6 * sum(a * b for a, b in LAYERS) - 2 * WIDTHS[0] * WIDTHS[1]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def quickest_s(work: Callable[[], object], repeats: int) -> float:
    """Of several runs, after one to warm up."""
    work()
    found = []
    for _ in range(repeats):
        started_s = time.perf_counter()
        work()
        found.append(time.perf_counter() - started_s)
    return min(found)


def one_dnn(a: Tensor, b: Tensor) -> Tensor:
    """Rows a times b transposed, by oneDNN."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return y


def square_rate(dtype: torch.dtype) -> float:
    """FLOP/s of the better library for a large square product."""
    a, b = torch.randn(2, SQUARE, SQUARE).to(dtype)
    ways = [lambda: a @ b, lambda: one_dnn(a, b)]
    return 2 * SQUARE**3 / min(quickest_s(way, 5) for way in ways)


def layers_rate(dtype: torch.dtype, batch: int) -> float:
    """FLOP/s of the products of all layers: forwards, and for weights and inputs backwards; each by the better library."""
    seconds = 0.0
    for n, (width_in, width) in enumerate(LAYERS):
        x, w, g = (torch.randn(*s).to(dtype) for s in ((batch, width_in), (width, width_in), (batch, width)))
        products = [(x, w), (g.T, x.T), *([(g, w.T)] if n else [])]
        for a, b in products:
            ways: list[Callable[[], object]] = [
                lambda a=a, b=b: a @ b.T,  # type: ignore[misc]
                lambda a=a, b=b: one_dnn(a, b),  # type: ignore[misc]
            ]
            seconds += min(quickest_s(way, 10) for way in ways)
    return FLOPS_PER_IMAGE * batch / seconds


class Shares(EpochTimes):
    """Of each epoch: its rate over that of the square product, and of the layers' products, measured right before and after it."""

    def __init__(self, dtype: torch.dtype, n: int, batch: int) -> None:
        super().__init__(self._measure)
        self.dtype, self.n, self.batch = dtype, n, batch
        self.rates = [(square_rate(dtype), layers_rate(dtype, batch))]
        self.shares: list[tuple[float, float, float]] = []

    def _measure(self) -> None:
        self.rates.append((square_rate(self.dtype), layers_rate(self.dtype, self.batch)))
        own = self.n * FLOPS_PER_IMAGE / self.seconds["reconstruct"][-1]
        square, layers = (max(pair) for pair in zip(*self.rates[-2:], strict=True))
        self.shares.append((own, own / square, own / layers))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=70_000)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--precisions", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    arguments = parser.parse_args()
    pixels = images(real_set("mnist.npz"), arguments.images)
    table: list[list[object]] = []
    for precision in arguments.precisions:
        found = Shares(DTYPES[precision], len(pixels), arguments.batch)
        pretrain(pixels, arguments.epochs, found, precision=precision, device="cpu", batch_size=arguments.batch)
        square, layers = (max(rates) / 1e9 for rates in zip(*found.rates, strict=True))
        own, of_square, of_layers = (statistics.median(column) for column in zip(*found.shares, strict=True))
        best = max(share for _, share, _ in found.shares)
        row: list[object] = [precision, f"{square:.0f}", f"{layers:.0f}", f"{found.usual('reconstruct'):.1f}"]
        table.append([*row, f"{own / 1e9:.0f}", f"{of_square:.0%} (best {best:.0%})", f"{of_layers:.0%}"])
    show_table(
        f"One pre-training epoch, {len(pixels)} images, batch {arguments.batch}, {torch.get_num_threads()} threads, median of {arguments.epochs}",
        ["", f"{SQUARE} square, GFLOP/s", "layers alone", "epoch, s", "GFLOP/s", "of the square", "of the layers"],
        table,
    )


if __name__ == "__main__":
    main()
