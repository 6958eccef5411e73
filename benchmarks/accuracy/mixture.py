"""deepcluster_mixture on the CIFAR-10 subset and x_sdd: how many components remain of 300, by warm start and relabelling period.

Labels serve scoring only. ACC is not shown: it needs as many clusters as classes. Beside NMI, purity, since more clusters can only
raise it. x_sdd starts from one shared autoencoder per seed, CIFAR from one DeepCluster run (--start; see pseudo_labels.py).

    python -m benchmarks.accuracy.mixture --data x_sdd --warm responsibilities posterior fresh --every 1 3 10
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.accuracy.cifar import cifar_subset
from benchmarks.table import FEATURE_WEIGHTS, real_set, show_table
from trainer.errors import CollapseError
from trainer.progress import Terminal
from trainer.trials import fit_or_reuse, load_base

TRUE_CLASSES = {"x_sdd": 7, "cifar": 10}


def overrides_of(data: str, out: Path) -> tuple[str, list[str]]:
    """The shipped settings for `data`, and what is set in them."""
    cache = f"pretrain.cache={out / 'autoencoders'}"
    if data == "x_sdd":
        return "x_sdd_deepcluster_mixture", [f"data.path={real_set('x_sdd')}", FEATURE_WEIGHTS, cache]
    return "cifar_deepcluster_mixture", [f"data.path={cifar_subset(out / 'sets', 'train')}", cache]


def measure(data: str, warm: str, every: int, seed: int, out: Path, extra: list[str]) -> list[object]:
    """One line of the table."""
    config, overrides = overrides_of(data, out)
    chosen = [f"method.warm={warm}", f"method.relabel_every_epochs={every}", f"train.seed={seed}", *extra]
    base, _ = load_base(config, [*overrides, *chosen])
    try:
        run = fit_or_reuse(base, out / "mixture" / f"{data}-{warm}-{every}-{seed}", Terminal())
    except CollapseError as error:
        return [warm, every, seed, str(error).split(";")[0], "", "", "", "", ""]
    metrics = run.info["metrics"]
    inside = TRUE_CLASSES[data] <= metrics["components"] <= 10 * TRUE_CLASSES[data]
    figures = [metrics["nmi"], metrics["purity"], metrics["agreement"], metrics["agreement_means"]]
    return [
        warm,
        every,
        seed,
        f"{metrics['components']:.0f}{'' if inside else ' (outside)'}",
        *figures,
        run.info["train"]["minutes"],
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=TRUE_CLASSES, default="x_sdd")
    parser.add_argument("--warm", nargs="+", default=["responsibilities", "posterior", "fresh"])
    parser.add_argument("--every", type=int, nargs="+", default=[1, 3, 10], help="epochs between two clusterings")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=Path("runs/accuracy"))
    parser.add_argument("--set", action="append", default=[], dest="overrides", help="for all rows")
    arguments = parser.parse_args()
    table = [
        measure(arguments.data, warm, every, seed, arguments.out, arguments.overrides)
        for warm in arguments.warm
        for every in arguments.every
        for seed in arguments.seeds
    ]
    c = TRUE_CLASSES[arguments.data]
    header = [
        "warm start",
        "relabel every",
        "seed",
        "components",
        "NMI",
        "purity",
        "agreement",
        "of the means",
        "minutes",
    ]
    show_table(f"{arguments.data}: {c} classes, so {c} to {10 * c} components are asked", header, table)


if __name__ == "__main__":
    main()
