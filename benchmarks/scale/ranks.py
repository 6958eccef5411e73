"""Two gloo processes, one core each, against one process on one core: seconds of a pre-training epoch at the same global batch.

python -m benchmarks.scale.ranks [--images N] [--epochs N] [--rounds N] [--processes N]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.table import show_table

BATCH, SIDE_PX = 1024, 28
ENCODERS = {
    "conv 32-64-128": "{name: conv, dim: 10}",
    "mlp 500-500-2000-10": "{name: mlp, hidden: [500, 500, 2000], dim: 10}",
}
SETTINGS = """
data: {{path: {path}}}
preprocess: {{resize: none, color: gray}}
encoder: {encoder}
pretrain: {{epochs: {epochs}}}
method: {{name: ae_kmeans, n_clusters: 10, n_init: 1}}
novelty: none
train: {{batch_size: {batch}, device: cpu, checkpoint_every_s: 1000000}}
"""


def epoch_s(config: Path, out: Path, processes: int) -> float:
    """Median seconds of the epochs after the first."""
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
    launcher = start if processes > 1 else [sys.executable]
    cores = ",".join(str(core) for core in sorted(os.sched_getaffinity(0))[:processes])
    words = ["taskset", "-c", cores, *launcher, "-m", "trainer", "fit", str(config), "--out", str(out)]
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=environ, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(row["seconds"] for row in rows[1:] if row["stage"] == "reconstruct")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=8 * BATCH)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3, help="pairs; the median ratio is shown")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    rows: list[list[object]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.savez(folder / "images.npz", X=rng.integers(0, 256, (arguments.images, SIDE_PX, SIDE_PX), np.uint8))
        for title, encoder in ENCODERS.items():
            config = folder / "config.yaml"
            config.write_text(
                SETTINGS.format(path=folder / "images.npz", encoder=encoder, epochs=arguments.epochs, batch=BATCH)
            )
            pairs = [
                [epoch_s(config, folder / f"{title[:4]}-{n}-{count}", count) for count in (1, arguments.processes)]
                for n in range(arguments.rounds)
            ]
            ratios = [one / many for one, many in pairs]
            one, many = (statistics.median(pair[n] for pair in pairs) for n in range(2))
            asked = 1.6 if title.startswith("conv") and arguments.processes == 2 else ""
            shown = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            rows.append([title, f"{one:.2f}", f"{many:.2f}", shown, asked])
    header = ["encoder", "one process, s/epoch", f"{arguments.processes} processes, s/epoch", "times faster", "asked"]
    show_table(
        f"{arguments.images} images {SIDE_PX}x{SIDE_PX}, global batch {BATCH}, gloo, one core each", header, rows
    )


if __name__ == "__main__":
    main()
