"""The resnet encoder at 224 x 224: images per second of a pre-training epoch against its bare forward-backward loop, same batch, same device.

    python -m benchmarks.scale.resnet                          # on a GPU where there is one, batch 64
    python -m benchmarks.scale.resnet --batch 8 --images 48    # on a CPU, to see that the loop costs nothing there either

Ours: uint8 images gathered, normalised, encoder and decoder there and back, guards, optimizer, log. Bare: one batch that is there already, encoder
and decoder there and back, nothing else.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch

from benchmarks.scale.epoch_times import EpochTimes, pretrain
from benchmarks.table import show_table
from trainer.artifact import build_model
from trainer.settings import TrainSettings

SIDE_PX = 224
ENCODER: dict[str, object] = {"name": "resnet", "dim": 64}


class Bare:
    """The same network on one batch of noise."""

    def __init__(self, batch: int, device: str, precision: str) -> None:
        settings = TrainSettings.model_validate(
            {
                "data": {"path": "noise.npz"},
                "preprocess": {"resize": "none", "normalise": "unit"},
                "encoder": ENCODER,
                "method": {"name": "ae_kmeans", "n_clusters": 2},
            }
        )
        encoder = build_model(settings, (SIDE_PX, SIDE_PX), 2).encoder.to(device)
        decoder = encoder.build_decoder()
        if decoder is None:
            raise ValueError(f"{settings.encoder.name} has no decoder")
        self.encoder, self.decoder = encoder.train(), decoder.to(device).train()
        self.x = torch.rand(batch, 3, SIDE_PX, SIDE_PX, device=device).to(memory_format=torch.channels_last)
        self.device, self.precision = device, precision

    def step(self) -> None:
        """There and back."""
        for module in (self.encoder, self.decoder):
            module.zero_grad(set_to_none=True)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bf16"):
            output = self.decoder(self.encoder.head(self.x))
        torch.nn.functional.mse_loss(output.float(), self.x).backward()

    def images_per_s(self, steps: int) -> float:
        """The best of `steps` steps on a CPU, whose other work disturbs; of all of them together on a GPU."""
        self.step()
        if self.device == "cuda":
            torch.cuda.synchronize()
        found = []
        started_s = time.perf_counter()
        for _ in range(steps):
            self.step()
            if self.device == "cpu":
                found.append(time.perf_counter() - started_s)
                started_s = time.perf_counter()
        if self.device == "cuda":
            torch.cuda.synchronize()
            found = [(time.perf_counter() - started_s) / steps]
        return len(self.x) / float(np.median(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--images", type=int, default=4096)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pixels = np.random.default_rng(0).integers(0, 255, (arguments.images, SIDE_PX, SIDE_PX, 3), dtype=np.uint8)
    table: list[list[object]] = []
    for precision in arguments.precisions:
        bare = Bare(arguments.batch, device, precision)
        rates: list[float] = []
        times = EpochTimes(lambda bare=bare, rates=rates: rates.append(bare.images_per_s(8)))  # type: ignore[misc]
        pretrain(pixels, arguments.epochs, times, ENCODER, batch_size=arguments.batch, precision=precision)
        alone, ours = float(np.median(rates)), len(pixels) / times.usual("reconstruct")
        table.append([precision, f"{alone:.1f}", f"{ours:.1f}", f"{ours / alone:.0%}"])
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    show_table(
        f"resnet, {SIDE_PX} x {SIDE_PX}, batch {arguments.batch}, {name}, medians of {arguments.epochs} epochs in turns",
        ["", "bare, images/s", "fit, images/s", "share"],
        table,
    )


if __name__ == "__main__":
    main()
