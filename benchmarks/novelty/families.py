"""x_sdd, each class in turn unseen: do its novel parts come out as one family, and does anything else?

Half of the known images train and calibrate (5 % target), the other half and all of the unseen class are the line's parts. What is judged
novel is searched, the known parts that are not novel serve for comparison, as a station's reservoir does. The row "control" is the same without the
unseen class: parts called novel by chance. The rules' limits were set on drawn clusters and looked at on this set, so it is no independent test.

python -m benchmarks.novelty.families [--seeds N]
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.novelty.parts import GOOD, Part, write_list
from benchmarks.table import WEIGHTS, real_set, show_table
from edge_dkm.families.finding import Beside, FamilyOptions, find_families
from trainer import FitOptions, fit
from trainer.answers import read_like


@dataclass(frozen=True)
class Row:
    """One class left out, one seed. `families`: (parts, share of them of the unseen class) of each."""

    unseen: int
    novel: int
    false_rejects: int
    families: list[tuple[int, float]]
    control: int


def measure(images: list[tuple[Path, str]], left_out: str, seed: int) -> Row:
    """Fits on half of the other classes and searches the rest."""
    known = [path for path, name in images if name != left_out]
    order = np.random.default_rng(seed).permutation(len(known))
    learned = [Part(known[n], GOOD, str(known[n])) for n in order[: len(known) // 2]]
    line = [Part(known[n], GOOD, str(known[n])) for n in order[len(known) // 2 :]]
    line += [Part(path, left_out, str(path)) for path, name in images if name == left_out]
    with tempfile.TemporaryDirectory() as folder:
        path = write_list(learned, Path(folder) / "learned.csv")
        sets = (f"data.path={path}", WEIGHTS, f"train.seed={seed}", "novelty={target_frr: 0.05}")
        run = fit("x_sdd_ae_kmeans", FitOptions(Path(folder) / "run", sets))
        dataset = read_like(run, str(write_list(line, Path(folder) / "line.csv")))
        z = run.model.embed_dataset(dataset.pixels).numpy()
        seen = run.model.see(dataset.pixels)
        is_novel = run.model.novelty_scores(seen).numpy() > 1
    mean, radius = run.model.cluster_mean.numpy(), run.model.cluster_radius.numpy()
    options = FamilyOptions(edge=float(run.model.novelty_scale))
    is_new = ~dataset.good

    def search(rows: np.ndarray) -> list[np.ndarray]:
        beside = Beside(ordinary=z[~is_novel & ~is_new])
        return [rows[family.members] for family in find_families(z[rows], rows, mean, radius, beside, options)]

    families = search(np.flatnonzero(is_novel))
    return Row(
        int(is_new.sum()),
        int((is_novel & is_new).sum()),
        int((is_novel & ~is_new).sum()),
        [(len(members), float(is_new[members].mean())) for members in families],
        len(search(np.flatnonzero(is_novel & ~is_new))),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1)
    arguments = parser.parse_args()
    folder = real_set("x_sdd")
    images = [(path, path.parent.name) for path in sorted(folder.glob("*/*.*g"))]
    rows: list[list[object]] = []
    for name in sorted({name for _, name in images}):
        for seed in range(arguments.seeds):
            row = measure(images, name, seed)
            found = ", ".join(f"{n} ({share:.0%})" for n, share in row.families) or "none"
            rows.append([name, seed, row.unseen, row.novel, row.false_rejects, found, row.control or "none"])
    header = [
        "unseen class",
        "seed",
        "its parts",
        "novel",
        "false rejects",
        "families: parts (of the class)",
        "control",
    ]
    show_table("families on x_sdd", header, rows)


if __name__ == "__main__":
    main()
