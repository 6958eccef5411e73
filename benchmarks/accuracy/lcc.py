"""Supervised fine-tuning on x_sdd and a CIFAR-10 subset: does Latent Cluster Correction help? Test accuracy and seconds of its three arms.

The arms differ in one setting: cross-entropy alone, a pull towards neighbours of the same class, the correction. Every seed draws
another half of x_sdd to learn from (the other half is the test); CIFAR has a test part. `classifier` is the linear head's accuracy,
`nearest` that of the class of the nearest centroid, which is what ships.

    python -m benchmarks.accuracy.lcc --data x_sdd --seeds 0 1 2 3 4
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
from safetensors.torch import load_file

from benchmarks.accuracy.cifar import cifar_subset
from benchmarks.table import FEATURE_WEIGHTS, real_set, show_table
from trainer.artifact import Run, load_run
from trainer.cluster_names import class_of
from trainer.data import Dataset
from trainer.loop import METRICS
from trainer.methods.lcc import CLASSIFIER
from trainer.model import evaluating
from trainer.progress import Silent, Terminal
from trainer.trials import fit_or_reuse, load_base, read_images

ARMS = ("cross_entropy", "same_class", "lcc")


def x_sdd_halves(folder: Path, seed: int) -> dict[str, Path]:
    """Lists of two random halves of x_sdd, stratified by class."""
    paths = {part: folder / f"x_sdd_{part}_{seed}.csv" for part in ("train", "test")}
    if not all(path.exists() for path in paths.values()):
        folder.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(seed)
        rows: dict[str, list[str]] = {"train": [], "test": []}
        for kind in sorted(p for p in real_set("x_sdd").iterdir() if p.is_dir()):
            files = sorted(str(f.resolve()) for f in kind.iterdir() if f.suffix.lower() in {".jpg", ".png", ".bmp"})
            order = rng.permutation(len(files))
            rows["train"] += [f"{files[n]},{kind.name}" for n in order[: len(files) // 2]]
            rows["test"] += [f"{files[n]},{kind.name}" for n in order[len(files) // 2 :]]
        for part, path in paths.items():
            path.write_text("file,label\n" + "\n".join(rows[part]) + "\n")
    return paths


def measure(data: str, arm: str, seed: int, out: Path, extra: list[str]) -> tuple[float, float, float, int]:
    """Accuracy of the classifier and of the nearest centroid on the test images, seconds per epoch, clusters."""
    if data == "x_sdd":
        parts, config, more = x_sdd_halves(out / "sets", seed), "x_sdd_lcc", [FEATURE_WEIGHTS, "novelty=none"]
    else:
        parts = {part: cifar_subset(out / "sets", part) for part in ("train", "test")}
        config, more = "cifar_lcc", []
    settings, _ = load_base(
        config, [f"data.path={parts['train']}", f"train.seed={seed}", f"method.arm={arm}", *more, *extra]
    )
    folder = out / "lcc" / f"{data}-{arm}-{seed}"
    fit_or_reuse(settings, folder, Terminal())
    run = load_run(folder)  # on the CPU, wherever it was learned
    data_settings = settings.data.model_copy(update={"path": str(parts["test"])})
    test = read_images(settings.model_copy(update={"data": data_settings}), Silent())
    rows = [json.loads(line) for line in (run.path / METRICS).read_text().splitlines()] if run.path else []
    seconds = [row["seconds"] for row in rows if row["stage"] == "lcc"]
    return _classifier(run, test), _nearest(run, test), mean(seconds), run.model.n_clusters


@torch.no_grad()
def _classifier(run: Run, test: Dataset) -> float:
    head = load_file(Path(run.path or "") / CLASSIFIER)
    model = run.model
    with evaluating(model):
        parts = [model.encoder(model.preprocess.normalise(part)) for part in test.pixels.split(256)]
    answers = (torch.cat(parts) @ head["weight"].T + head["bias"]).argmax(1).numpy()
    return float((answers == test.known).mean())


def _nearest(run: Run, test: Dataset) -> float:
    ids = run.model.assign(run.model.embed_dataset(test.pixels))[0].numpy()
    owners = [class_of(row["name"], test.classes) for row in run.info["clusters"]]
    return float((np.array(owners)[ids] == test.known).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=["x_sdd", "cifar"], default="x_sdd")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", type=Path, default=Path("runs/accuracy"))
    parser.add_argument("--set", action="append", default=[], dest="overrides", help="for all rows")
    arguments = parser.parse_args()
    table: list[list[object]] = []
    control: list[float] = []
    for arm in arguments.arms:
        found = [measure(arguments.data, arm, seed, arguments.out, arguments.overrides) for seed in arguments.seeds]
        classifier, by_centroid, seconds, clusters = (list(column) for column in zip(*found, strict=True))
        control = control or classifier
        gain = [a - b for a, b in zip(classifier, control, strict=True)]
        spread = f"{mean(gain):+.4f} +- {stdev(gain):.4f}" if len(gain) > 1 and arm != arguments.arms[0] else ""
        table.append([arm, _with_spread(classifier), spread, _with_spread(by_centroid), mean(clusters), mean(seconds)])
    header = [
        "arm",
        "classifier",
        f"against {arguments.arms[0]}, paired",
        "nearest centroid",
        "clusters",
        "s per epoch",
    ]
    show_table(f"{arguments.data}: accuracy on unseen images, {len(arguments.seeds)} seeds", header, table)


def _with_spread(values: list[float]) -> str:
    return f"{mean(values):.4f}" + (f" +- {stdev(values):.4f}" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
