"""MNIST, USPS and Fashion-MNIST, fitted and scored on all images as in the papers: ACC, NMI, ARI and minutes of each method over seeds.

Labels serve scoring only; `between seeds`, the mean ARI of each two seeds' answers, needs none: choose by it. All methods of a seed start
from one autoencoder (`pretrain.cache` in --out), so rows are paired. Runs are kept in --out and not repeated: a table can grow over
several calls, and `--tabulate` only prints what is there.

    python -m benchmarks.accuracy.digits --data usps --rows ae_kmeans dec idec --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
from sklearn.metrics import adjusted_rand_score

from benchmarks.table import real_set, show_table
from trainer.errors import CollapseError
from trainer.progress import Terminal
from trainer.report.assignment_table import read_assignments
from trainer.trials import fit_or_reuse, load_base

SETS = {"mnist": "mnist.npz", "usps": "usps.npz", "fashion": "fashion_mnist.npz", "imbalanced": "mnist.npz"}
DEC_DA = "augment={shift: 0.1, rotate_deg: 10}"  # DEC-DA's own, not tuned here
CONV, ADAM = "encoder={name: conv, dim: 10}", "pretrain={epochs: 200}"  # DEKM's own autoencoder
# All as the authors of DKM have it.
DKM_OWN = ("encoder.init=glorot", "pretrain={epochs: 50}", "method.optimizer.lr=0.001")
SPECTRAL = "method.init=spectral"
USPS_T = "method.refresh_steps=30"  # Guo's T for USPS, whose epoch has 37 steps; 140 is MNIST's


@dataclass(frozen=True)
class Row:
    """A shipped settings file, what is changed in it, and the ACC that was published per set."""

    config: str
    overrides: tuple[str, ...] = ()
    published: tuple[tuple[str, float], ...] = ()


ROWS = {
    "ae_kmeans": Row(
        "mnist_ae_kmeans", (), (("mnist", 0.818), ("usps", 0.709), ("fashion", 0.606), ("imbalanced", 0.668))
    ),
    "dec_frozen": Row("mnist_dec", ("method.freeze_encoder=true",), (("mnist", 0.798),)),
    "dec": Row("mnist_dec", (), (("mnist", 0.843), ("usps", 0.764), ("fashion", 0.618), ("imbalanced", 0.701))),
    "idec": Row("mnist_idec", (), (("mnist", 0.881), ("usps", 0.761))),
    "dcn": Row("mnist_dcn", (), (("mnist", 0.830), ("usps", 0.730))),
    "dkm": Row("mnist_dkm", (), (("mnist", 0.840), ("usps", 0.757))),
    "dkm_own": Row("mnist_dkm", DKM_OWN, (("mnist", 0.840), ("usps", 0.757))),
    "dkm_annealed": Row("mnist_dkm_annealed", (), (("mnist", 0.823), ("usps", 0.755))),
    "dekm": Row("mnist_dekm"),  # the published figure is of a convolutional autoencoder
    "dekm_conv": Row("mnist_dekm", (CONV, ADAM), (("mnist", 0.957), ("usps", 0.798))),
    "centering": Row("mnist_centering"),
    "ae_kmeans_da": Row("mnist_ae_kmeans", (DEC_DA,)),
    "dec_da": Row("mnist_dec", (DEC_DA,), (("mnist", 0.985), ("usps", 0.987), ("fashion", 0.586))),
    "idec_da": Row("mnist_idec", (DEC_DA,), (("mnist", 0.985), ("usps", 0.987))),
    **{
        f"centering_a{alpha:g}_{init}": Row("mnist_centering", (f"method.alpha={alpha}", f"method.init={init}"))
        for alpha in (0.5, 1.0, 2.0, 5.0)
        for init in ("kmeans", "random")
    },
    **{
        f"{name}_spectral": Row(f"mnist_{name}", (SPECTRAL,))
        for name in ("dec", "idec", "dcn", "dkm", "dekm", "centering")
    },
    "dec_da_spectral": Row("mnist_dec", (DEC_DA, SPECTRAL)),
    "idec_da_spectral": Row("mnist_idec", (DEC_DA, SPECTRAL)),
    **{
        f"dec_lr{lr:g}_t{steps}": Row("mnist_dec", (f"method.optimizer.lr={lr}", f"method.refresh_steps={steps}"))
        for lr in (0.003, 0.01, 0.03)
        for steps in (70, 140, 280)
    },
}


def imbalanced(folder: Path, seed: int) -> Path:
    """MNIST with class 0 kept with probability .1 rising to 1 for class 9 (Xie et al. 2016, Table 4)."""
    path = folder / f"mnist_imbalanced_{seed}.npz"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        data = np.load(real_set("mnist.npz"))
        keep = np.random.default_rng(seed).random(len(data["y"])) < 0.1 + 0.9 * data["y"] / 9
        temporary = path.with_name(f".{os.getpid()}-{path.name}")
        np.savez(temporary, X=data["X"][keep], y=data["y"][keep])
        temporary.replace(path)
    return path


def measure(data: str, name: str, seed: int, out: Path, extra: Sequence[str]) -> dict[str, Any] | str:
    """model.json of the run, made now unless a run of the same settings is there; the guard's words where one stopped it.

    Raises:
        DataError: the folder holds a run of other settings.
    """
    row = ROWS[name]
    path = imbalanced(out / "sets", seed) if data == "imbalanced" else real_set(SETS[data])
    cache = [] if "annealed" in name else [f"pretrain.cache={out / 'autoencoders'}"]
    refresh = [USPS_T] if data == "usps" and row.config in {"mnist_dec", "mnist_idec"} else []
    # The cache last: a row that sets the whole of `pretrain` would lose it, and pre-train anew for each method.
    overrides = [f"train.seed={seed}", f"data.path={path}", *refresh, *row.overrides, *extra, *cache]
    try:
        return fit_or_reuse(load_base(row.config, overrides)[0], out / data / f"{name}-{seed}", Terminal()).info
    except CollapseError as error:
        return str(error)


def there(data: str, name: str, seed: int, out: Path) -> dict[str, Any] | None:
    """model.json of a run that is there already."""
    path = out / data / f"{name}-{seed}" / "model.json"
    return dict(json.loads(path.read_text())) if path.exists() else None


def between_seeds(data: str, name: str, seeds: Sequence[int], out: Path) -> str:
    """Mean ARI of each two runs' clusters, "-" of a single one or of sets that were drawn by the seed."""
    if len(seeds) < 2 or data == "imbalanced":
        return "-"
    answers = [[row.cluster for row in read_assignments(out / data / f"{name}-{seed}")] for seed in seeds]
    return f"{mean(adjusted_rand_score(a, b) for a, b in combinations(answers, 2)):.3f}"


def line(data: str, name: str, found: Sequence[dict[str, Any] | str], out: Path) -> list[object]:
    """One row of the table; a seed that a guard stopped is counted, not averaged."""
    runs = [info for info in found if not isinstance(info, str)]
    columns = [[info["metrics"][key] for info in runs] for key in ("acc", "nmi", "ari")]
    cells = [
        (f"{mean(column):.3f}" + (f" +- {stdev(column):.3f}" if len(column) > 1 else "")) if column else "-"
        for column in columns
    ]
    fitted = [info["train"]["seed"] for info in runs]
    seeds = " ".join(map(str, fitted))
    stopped = f", {len(found) - len(runs)} stopped by a guard" if len(runs) < len(found) else ""
    minutes = f"{mean(info['train']['minutes'] for info in runs):.1f}" if runs else "-"
    return [
        name,
        dict(ROWS[name].published).get(data, ""),
        *cells,
        between_seeds(data, name, fitted, out),
        seeds + stopped,
        minutes,
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=SETS, default="mnist")
    parser.add_argument(
        "--rows", nargs="+", choices=ROWS, default=["ae_kmeans", "dec", "idec", "dcn", "dkm", "dekm"], metavar="ROW"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/accuracy"))
    parser.add_argument(
        "--set", action="append", default=[], dest="overrides", help="for all rows, e.g. train.precision=bf16"
    )
    parser.add_argument("--tabulate", action="store_true", help="print what is in --out, fit nothing")
    arguments = parser.parse_args()
    table = []
    for name in arguments.rows:
        found: list[dict[str, Any] | str] = []
        for seed in arguments.seeds:
            if arguments.tabulate:
                known = there(arguments.data, name, seed, arguments.out)
                found += [known] if known else []
            else:
                found.append(measure(arguments.data, name, seed, arguments.out, arguments.overrides))
        if found:
            table.append(line(arguments.data, name, found, arguments.out))
    title = f"{arguments.data}: mean +- standard deviation over seeds; minutes are without a shared autoencoder's, once made"
    show_table(title, ["row", "published ACC", "ACC", "NMI", "ARI", "between seeds", "seeds", "minutes"], table)


if __name__ == "__main__":
    main()
