"""A stream too long to hold: stochastic quantization and mini-batch k-means in one pass, against Lloyd on a sample of it.

    python -m benchmarks.accuracy.stream_quantization                                         # 10 M vectors, some 20 minutes on a busy machine
    python -m benchmarks.accuracy.stream_quantization --n 500000 --sample 100000 --seed 1     # a few minutes

The stream is a mixture of K Gaussians with log-normal weights, drawn batch by batch from the seed and never stored. Seconds are those
of learning, each in a process of its own; drawing the stream is measured apart. Memory is the resident set's growth over a pass, in all
(with what the libraries take at first use) and after the first tenth. The objective is the mean squared distance of 100,000 vectors of
the same mixture that none has seen. Lloyd (one start, at most 100 iterations) sees the stream's first `--sample` vectors;
its seconds are those of the iterations alone, extrapolated linearly to the whole stream as if it took as many iterations there.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import get_context

import psutil
import torch
from torch import Tensor

from benchmarks.table import show_table
from trainer.clustering.engine import build_assign
from trainer.clustering.kmeans import KMeansOptions, kmeans, plus_plus
from trainer.clustering.mini_batch import updated
from trainer.clustering.stochastic_quantization import StochasticQuantizer
from trainer.distance import nearest

CHUNK = 8192  # rows drawn at a time
BATCH = 1024
PILOT = 10_000  # rows that mini-batch k-means is seeded from, as many as the quantizer's
HELD_OUT = 100_000
LLOYD_ITERATIONS = 100
QUANTIZATION, MINI_BATCH = "stochastic quantization", "mini-batch k-means"


@dataclass(frozen=True)
class Mixture:
    """`centres` (K, D) of unit-variance Gaussians and their `cumulative` weights (K,)."""

    centres: Tensor
    cumulative: Tensor

    @classmethod
    def draw(cls, clusters: int, dim: int, seed: int) -> Mixture:
        generator = torch.Generator().manual_seed(seed)
        weights = torch.randn(clusters, generator=generator, dtype=torch.float64).exp()
        return cls(torch.randn(clusters, dim, generator=generator), (weights / weights.sum()).cumsum(0))

    def rows(self, count: int, seed: int) -> Iterator[Tensor]:
        """`count` rows in chunks (at most CHUNK, D), the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        for start in range(0, count, CHUNK):
            size = min(CHUNK, count - start)
            drawn = torch.searchsorted(self.cumulative, torch.rand(size, generator=generator, dtype=torch.float64))
            noise = torch.randn(size, self.centres.shape[1], generator=generator)
            yield noise.add_(self.centres[drawn.clamp_max(len(self.centres) - 1)])


@dataclass(frozen=True)
class Pass:
    """What one pass cost: `seconds` of learning and of `drawing`; growth of the resident set in MB, in all and after the first tenth."""

    seconds: float
    drawing: float
    grown_mb: float
    grown_later_mb: float


def one_pass(stream: Iterator[Tensor], count: int, learn: Callable[[Tensor], object]) -> Pass:
    """Feeds `count` rows of the stream to `learn`."""
    process = psutil.Process()
    start = tenth = peak = process.memory_info().rss
    began, learning, seen = time.perf_counter(), 0.0, 0
    for batch in stream:
        before = time.perf_counter()
        learn(batch)
        learning += time.perf_counter() - before
        seen += len(batch)
        peak = max(peak, process.memory_info().rss)
        if seen <= count // 10:
            tenth = peak
    return Pass(learning, time.perf_counter() - began - learning, (peak - start) / 2**20, (peak - tenth) / 2**20)


class MiniBatch:
    """Mini-batch k-means over a stream: the package's update, seeded as the quantizer is."""

    def __init__(self, clusters: int, seed: int) -> None:
        self.clusters = clusters
        self.generator = torch.Generator().manual_seed(seed)
        self.waiting: list[Tensor] = []
        self.mu: Tensor | None = None

    def learn(self, rows: Tensor) -> None:
        if self.mu is None:
            self.waiting.append(rows)
            if sum(map(len, self.waiting)) < PILOT:
                return
            rows = torch.cat(self.waiting)
            self.centre = rows[:PILOT].mean(0)
            self.mu = plus_plus(rows[:PILOT] - self.centre, self.clusters, self.generator).double()
            self.counts = torch.zeros(self.clusters, dtype=torch.float64)
        for part in rows.split(BATCH):
            batch = part - self.centre
            labels = build_assign(batch, self.clusters, "torch")(self.mu)[0]
            self.mu, self.counts = updated(self.mu, self.counts, batch, labels)

    @property
    def centroids(self) -> Tensor:
        assert self.mu is not None
        return (self.mu + self.centre).float()


def mean_squared(x: Tensor, centroids: Tensor) -> float:
    return float(nearest(x, centroids)[1].double().mean())


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=10_000_000, help="vectors of the stream")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--clusters", type=int, default=1000)
    parser.add_argument("--sample", type=int, default=500_000, help="vectors that Lloyd sees")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def streamed(asked: argparse.Namespace, name: str) -> tuple[Pass, Tensor]:
    """One pass of the learner `name` over the stream: its cost and its centroids (K, D)."""
    rows = Mixture.draw(asked.clusters, asked.dim, asked.seed).rows(asked.n, asked.seed + 1)
    if name == QUANTIZATION:
        quantizer = StochasticQuantizer(asked.clusters, asked.seed)
        cost = one_pass(rows, asked.n, quantizer.partial_fit)
        return cost, quantizer.finish().centroids  # what finish learns from is less than a batch
    mini_batch = MiniBatch(asked.clusters, asked.seed)
    return one_pass(rows, asked.n, mini_batch.learn), mini_batch.centroids


def main() -> None:
    asked = arguments()
    mixture = Mixture.draw(asked.clusters, asked.dim, asked.seed)
    held_out = torch.cat(list(mixture.rows(HELD_OUT, asked.seed + 2)))
    found = []
    for name in (QUANTIZATION, MINI_BATCH):
        # A process for each, so that none grows into memory that another has given back.
        with get_context("spawn").Pool(1) as pool:
            cost, centroids = pool.apply(streamed, (asked, name))
        found.append((name, cost, mean_squared(held_out, centroids)))
        print(*found[-1], flush=True)
    sample = torch.cat(list(mixture.rows(asked.sample, asked.seed + 1)))
    began = time.perf_counter()
    seeds = plus_plus(sample, asked.clusters, torch.Generator().manual_seed(asked.seed))
    seeded = time.perf_counter()
    lloyd = kmeans(sample, asked.clusters, asked.seed, KMeansOptions(max_iterations=LLOYD_ITERATIONS), init=seeds)
    scale = asked.n / asked.sample
    seeding_s, lloyd_s = (seeded - began) * scale, (time.perf_counter() - seeded) * scale
    reached = mean_squared(held_out, lloyd.centroids)
    rows: list[list[object]] = []
    for name, cost, objective in found:
        memory = [f"{cost.grown_mb:.1f}", f"{cost.grown_later_mb:.1f}"]
        ratio = f"{cost.seconds / lloyd_s:.4f}"
        rows.append([name, *_times(cost.seconds, asked.n), *memory, objective, objective / reached, ratio])
    name = f"Lloyd on {asked.sample:,}: {lloyd.iterations} iterations, s extrapolated"
    rows.append([name, *_times(lloyd_s, asked.n), "holds its sample", "-", reached, 1.0, "1"])
    drawing = min(cost.drawing for _, cost, _ in found)
    show_table(
        f"{asked.n:,} vectors, D = {asked.dim}, K = {asked.clusters}, seed {asked.seed}. Not counted: {drawing:.0f} s to draw the stream, "
        f"{seeding_s:.0f} s (extrapolated) of k-means++ for Lloyd",
        ["", "s", "s per 1 M", "RSS growth, MB", "after a tenth", "held-out objective", "of Lloyd", "time of Lloyd"],
        rows,
    )


def _times(seconds: float, count: int) -> list[str]:
    return [f"{seconds:.0f}", f"{seconds / count * 1e6:.1f}"]


if __name__ == "__main__":
    main()
