"""Memory and reading of a set on disk against one in memory, at N and 10 N images; images decoded per second by one worker and by all.

    python -m benchmarks.scale.memory                       # 2,000 and 20,000 drawn images of 64x64, some two minutes
    python -m benchmarks.scale.memory --n 20000 --side 96

Each row is a process of its own: it finds the images in a .tar, decodes them (into a file, or into memory), and trains a small convolutional
autoencoder for one epoch. Peak is the largest anonymous memory (RssAnon: what cannot be given back, without the page cache and mapped files)
that a thread sees every few milliseconds, above what the process held when everything was imported and one epoch was done on 1,024 images.
Of it the bookkeeping (names, groups, readers: bytes per image, by tracemalloc in a process apart) grows with N; the pixels must not.
"""

from __future__ import annotations

import argparse
import io
import os
import tarfile
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from benchmarks.table import show_table
from trainer.data import Dataset, load_dataset
from trainer.decoding import decoded_images, workers_of
from trainer.encoders.conv import ConvEncoder, ConvSettings
from trainer.images import DataSettings, open_images
from trainer.learner import Learner, LearnerOptions
from trainer.model import ClusterModel
from trainer.pixel_place import StorePlace
from trainer.preprocess import Preprocess, PreprocessSettings
from trainer.projection import Projection, ProjectionSettings
from trainer.stored_pixels import StoredPixels

WARM_UP = 1024
BATCH = 256
EVERY_S = 0.002
CLASSES = 10
FRAMES, FRAME_PX = 400, 512  # for the rate of decoding alone


@dataclass(frozen=True)
class Job:
    """What one process does; `memory` as data.memory has it."""

    path: Path
    side_px: int
    memory: str
    scratch: Path
    limit: int | None = None
    workers: int | None = None

    def settings(self) -> DataSettings:
        return DataSettings.model_validate(
            {"path": str(self.path), "memory": self.memory, "limit": self.limit, "workers": self.workers}
        )

    def preprocess(self) -> PreprocessSettings:
        return PreprocessSettings(height_px=self.side_px, width_px=self.side_px)


def write_tar(path: Path, count: int, side_px: int) -> None:
    """Noisy gradients as JPEG, in class folders."""
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 200, side_px, dtype=np.float32)
    with tarfile.open(path, "w") as archive:
        for n in range(count):
            image = ramp[:, None, None] * rng.random(3, np.float32) + ramp[None, :, None] * rng.random(3, np.float32)
            image = image / 2 + rng.random((side_px, side_px, 1), np.float32) * 50
            data = cv2.imencode(".jpg", image.astype(np.uint8))[1].tobytes()
            info = tarfile.TarInfo(f"kind{n % CLASSES}/{n:08d}.jpg")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("this system does not say RssAnon in /proc/self/status; the measurement needs Linux")


class Peak:
    """The largest anonymous memory while the block runs."""

    def __enter__(self) -> Peak:
        self.largest, self._done = anonymous_bytes(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(EVERY_S):
            self.largest = max(self.largest, anonymous_bytes())


def one_epoch(job: Job, dataset: Dataset) -> None:
    """Mean and deviation, then the reconstruction loss of every batch in a random order."""
    torch.manual_seed(0)
    preprocess = Preprocess(job.preprocess(), job.side_px, job.side_px)
    encoder = ConvEncoder(ConvSettings(channels=(8, 8, 8), dim=8), (3, job.side_px, job.side_px))
    model = ClusterModel(preprocess, encoder, Projection(ProjectionSettings(), 8, len(dataset)), 2)
    preprocess.fit_normalise(dataset.pixels)
    learner = Learner(model, dataset.pixels, LearnerOptions(0))
    decoder = learner.need_decoder("this measurement")
    optimizer = torch.optim.SGD([*encoder.parameters(), *decoder.parameters()], lr=1e-4)
    for index in torch.randperm(len(dataset)).split(BATCH):
        loss = learner.reconstruct(index)[1].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def fit_like(job: Job) -> dict[str, float]:
    """Peak above the warm process in bytes, seconds of reading and of the epoch, bytes on disk."""
    small = Job(job.path, job.side_px, job.memory, job.scratch / "small", WARM_UP)
    one_epoch(small, read(small))
    before = anonymous_bytes()
    with Peak() as peak:
        start_s = time.perf_counter()
        dataset = read(job)
        read_s = time.perf_counter() - start_s
        one_epoch(job, dataset)
        epoch_s = time.perf_counter() - start_s - read_s
    on_disk = dataset.pixels.path.stat().st_size if isinstance(dataset.pixels, StoredPixels) else 0
    return {"peak": peak.largest - before, "read_s": read_s, "epoch_s": epoch_s, "on_disk": on_disk, "n": len(dataset)}


def read(job: Job) -> Dataset:
    settings = job.settings()
    return load_dataset(open_images(settings), settings, job.preprocess(), iter, StorePlace(job.scratch))[0]


def bookkeeping(job: Job) -> dict[str, float]:
    """Bytes per image of the set as it is found and of the data set, without its pixels; and the most while it is read."""
    read(Job(job.path, job.side_px, "disk", job.scratch / "small", WARM_UP))
    tracemalloc.start()
    dataset = read(job)
    held, most = tracemalloc.get_traced_memory()
    return {"held": held / len(dataset), "most": most / len(dataset)}


def decoding(job: Job) -> dict[str, float]:
    """Images per second that are decoded and brought to half the size, and kept nowhere."""
    side_px = job.side_px // 2
    settings = job.settings()
    images, module = open_images(settings), Preprocess(job.preprocess(), side_px, side_px)
    start_s = time.perf_counter()
    count = sum(found.pixels is not None for found in decoded_images(images, module, settings.workers))
    return {"per_s": count / (time.perf_counter() - start_s), "workers": workers_of(images, settings.workers)}


def apart(work: Callable[[Job], dict[str, float]], job: Job) -> dict[str, float]:
    """The answer of `work` in a fresh process, whose allocator gives large blocks back at once: what it hoards would hide what is held."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 20)
    with get_context("spawn").Pool(1) as pool:
        found: dict[str, float] = pool.apply(work, (job,))
    return found


def rates_of(path: Path, side_px: int) -> list[list[Any]]:
    """Rows of the table: images per second by one worker, by all, and their ratio."""
    one, all_of_them = (apart(decoding, Job(path, side_px, "ram", path.parent, workers=n)) for n in (1, None))
    what = f"images of {side_px}x{side_px} per second"
    return [
        [f"{what}, 1 worker", f"{one['per_s']:.0f}"],
        [f"{what}, {all_of_them['workers']} workers", f"{all_of_them['per_s']:.0f}"],
        ["ratio", f"{all_of_them['per_s'] / one['per_s']:.2f}"],
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=2000, help="images of the smaller set (default 2000)")
    parser.add_argument("--side", type=int, default=64, help="pixels on a side (default 64)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dkm-memory-") as name:
        folder = Path(name)
        rows: list[list[Any]] = []
        for times in (1, 10):
            path = folder / f"{times}.tar"
            write_tar(path, times * arguments.n, arguments.side)
            for memory in ("ram", "disk"):
                job = Job(path, arguments.side, memory, folder / f"{memory}-{times}")
                found = apart(fit_like, job)
                pixels = found["n"] * 3 * arguments.side**2
                rows.append(
                    [
                        memory, int(found["n"]), f"{pixels / 1e6:.0f} MB", f"{found['peak'] / 1e6:.0f} MB",
                        f"{found['on_disk'] / 1e6:.0f} MB", f"{found['read_s']:.1f} s", f"{found['epoch_s']:.1f} s",
                    ]
                )  # fmt: skip
        show_table(
            "A set in memory and on disk: peak of anonymous memory above a warm process, while it is read and in one epoch",
            ("data.memory", "images", "pixels", "peak", "on disk", "read", "one epoch"),
            rows,
        )
        job = Job(folder / "10.tar", arguments.side, "disk", folder / "bookkeeping")
        kept = apart(bookkeeping, job)
        frames = folder / "frames.tar"
        write_tar(frames, FRAMES, FRAME_PX)
        rates = [
            row for path, side_px in ((job.path, job.side_px), (frames, FRAME_PX)) for row in rates_of(path, side_px)
        ]
        show_table(
            "Bookkeeping and decoding",
            ("what", "figure"),
            [
                ["bytes per image beside the pixels, held", f"{kept['held']:.0f}"],
                ["bytes per image beside the pixels, most while reading", f"{kept['most']:.0f}"],
                *rates,
            ],
        )


if __name__ == "__main__":
    main()
