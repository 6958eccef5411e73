"""The command line `dkm-train`. Heavy modules are imported inside the commands: `--help` answers at once."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from configs.command import INTERRUPTED, Parser, add_command, add_overrides, guarded, show

PLANNED = ("pilot", "select-k", "sweep", "label", "ingest", "init")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = Parser(prog="dkm-train", description="Learn image clusters and calibrate novelty, without labels.")
    parser.planned = PLANNED
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=argparse.ArgumentParser
    )

    fit = add_command(commands, "fit", _fit, "learn from a settings file or a shipped name")
    fit.add_argument("config", help="a YAML file, or a shipped name such as demo or x_sdd_dec")
    fit.add_argument("--out", type=Path, help="run folder (default: runs/<name>)")
    fit.add_argument("--resume", action="store_true", help="continue an interrupted run")
    add_overrides(fit)

    add_command(commands, "methods", _methods, "list the clustering methods")

    scan = add_command(commands, "scan", _scan, "look over a set of images: what is there, what cannot be used")
    scan.add_argument("data", help="a folder, an .npz, a list (.txt, .csv) or a film")

    evaluate = add_command(commands, "evaluate", _evaluate, "score a run on images with class folders")
    _add_run_and_data(evaluate)

    predict = add_command(commands, "predict", _predict, "cluster, distance and novelty of each image")
    _add_run_and_data(predict)
    predict.add_argument(
        "--sort-into",
        type=Path,
        metavar="DIR",
        help="link each image into a folder per cluster (copy where links are impossible)",
    )

    report = add_command(commands, "report", _report, "write report.html of a run again")
    report.add_argument("run", type=Path)
    return guarded(parser, argv)


def _add_run_and_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("data", help="a folder, an .npz, a list (.txt, .csv) or a film")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")


def _fit(arguments: argparse.Namespace) -> int:
    from trainer.fitting import FitOptions, fit
    from trainer.loop import InterruptedTraining
    from trainer.progress import Terminal
    from trainer.provenance import novelty_sentence

    options = FitOptions(arguments.out, arguments.overrides, arguments.resume, Terminal())
    try:
        run = fit(arguments.config, options)
    except InterruptedTraining as interruption:
        again = [
            "dkm-train",
            "fit",
            arguments.config,
            *(["--out", str(arguments.out)] if arguments.out else []),
            *(part for item in arguments.overrides for part in ("--set", item)),
            "--resume",
        ]
        print(f"dkm-train: {interruption}; go on with: {shlex.join(again)}", file=sys.stderr)
        return INTERRUPTED
    train, share = run.info["train"], run.metrics["largest_share"]
    lines = [
        f"run       {run.path}  ({train['minutes']:g} min, {train['n']} images, {train['skipped']} skipped)",
        "clusters  (training images) " + ", ".join(f"{row['name']} {row['n']}" for row in run.info["clusters"]),
        "metrics   " + ", ".join(f"{key} {value:.3f}" for key, value in run.metrics.items()),
        f"novelty   {novelty_sentence(run.info['novelty'])}",
        *([f"WARNING   one cluster holds {share:.0%} of all images"] if share > 0.9 and len(run.clusters) > 1 else []),
        f"next      look at {run.path}/report.html, name clusters in {run.path}/labels.yaml, then: dkm-export {run.path} -o part.onnx",
    ]
    show(
        arguments.json,
        {"run": str(run.path), "metrics": run.metrics, "novelty": run.info["novelty"], "train": train},
        "\n".join(lines),
    )
    return 0


def _methods(arguments: argparse.Namespace) -> int:
    from trainer.methods import METHODS

    rows = {name: method.title for name, method in METHODS.items()}
    show(arguments.json, rows, "\n".join(f"{name:<24}{title}" for name, title in rows.items()))
    return 0


def _scan(arguments: argparse.Namespace) -> int:
    from trainer.progress import Terminal
    from trainer.scan import scan

    result = scan(arguments.data, Terminal().read)
    show(arguments.json, result.plain(), result.text())
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from trainer.artifact import load_run
    from trainer.evaluate import evaluate
    from trainer.progress import Terminal

    result = evaluate(load_run(arguments.run, arguments.device), arguments.data, Terminal().read)
    show(arguments.json, result.plain(), result.text())
    return 0


def _predict(arguments: argparse.Namespace) -> int:
    import json

    from trainer.artifact import load_run
    from trainer.evaluate import predict, sort_into
    from trainer.progress import Terminal

    rows = predict(load_run(arguments.run, arguments.device), arguments.data, Terminal().read)
    for row in rows:
        print(json.dumps(row.plain(), ensure_ascii=False) if arguments.json else row.text())
    if arguments.sort_into is not None:
        linked, copied = sort_into(rows, Path(arguments.data), arguments.sort_into)
        print(f"{linked} linked, {copied} copied into {arguments.sort_into}", file=sys.stderr)
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from trainer.artifact import load_run
    from trainer.report import write_report

    run = load_run(arguments.run)
    path = arguments.run / "report.html"
    write_report(run, None, path)
    show(arguments.json, {"report": str(path)}, f"report    {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
