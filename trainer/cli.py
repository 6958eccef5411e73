"""The command line `dkm-train`. Heavy modules are imported inside the commands: `--help` answers at once."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from configs.command import INTERRUPTED, Handler, Parser, add_command, add_overrides, guarded, show

PLANNED = ("label", "init")
# As in trainer/images.py, which takes seconds to import.
PLACES = "a folder, an .npz, a list (.txt, .csv), an archive (.zip, .tar) or a film"


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

    scan = add_command(commands, "scan", _once(_scan), "look over a set of images: what is there, what cannot be used")
    scan.add_argument("data", help=PLACES)

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

    _add_comparisons(commands)
    _add_ingest(commands)

    report = add_command(commands, "report", _once(_report), "write report.html of a run again")
    report.add_argument("run", type=Path)
    return guarded(parser, argv)


def _once(handler: Handler) -> Handler:
    """A command that several processes would each do, into the same files."""

    def handle(arguments: argparse.Namespace) -> int:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from trainer.errors import DataError

            raise DataError(
                f"torchrun spreads fit, predict and evaluate; start {arguments.command} once, as dkm-train {arguments.command}"
            )
        return handler(arguments)

    return handle


def _add_comparisons(commands: Any) -> None:
    """select-k, sweep and pilot: several fits, judged without labels."""
    select = add_command(commands, "select-k", _once(_select_k), "choose the number of clusters, without labels")
    select.add_argument("config", help="a YAML file, or a shipped name")
    select.add_argument("--k", required=True, metavar="RANGE", help="numbers of clusters to try, as 2..20 or 4,6,8")
    select.add_argument("--seeds", type=int, default=3, help="embeddings to learn and look at (default 3)")
    select.add_argument("--out", type=Path, help="folder of runs and page (default: runs/<name>-select-k)")
    add_overrides(select)

    sweep = add_command(
        commands, "sweep", _once(_sweep), "compare methods and settings, without labels; the control comes first"
    )
    sweep.add_argument("config", nargs="+", help="YAML files or shipped names; the first one's control is the control")
    sweep.add_argument("--methods", metavar="M1,M2", help="put these methods in place of each file's own")
    sweep.add_argument(
        "--grid", metavar="KEY=V1,V2", action="append", default=[], help="try these values of a setting; repeatable"
    )
    sweep.add_argument(
        "--search", type=int, metavar="N", help="N random draws from --grid (or a built-in space) instead of all"
    )
    sweep.add_argument("--seeds", type=int, default=3, help="fits of each row, at least 2 (default 3)")
    sweep.add_argument("--out", type=Path, help="folder of runs and page (default: runs/<name>-sweep)")
    add_overrides(sweep)

    pilot = add_command(
        commands, "pilot", _once(_pilot), "minutes on part of a set: does clustering help, which settings to start from"
    )
    pilot.add_argument("data", help=PLACES)
    pilot.add_argument("--k", type=int, help="number of clusters, where you know it (else it is looked for)")
    pilot.add_argument(
        "--weights", type=Path, help="SqueezeNet 1.0 weights (.safetensors); far better than learning from scratch"
    )
    pilot.add_argument("--max-images", type=int, default=2000, help="at most this many, evenly spaced (default 2000)")
    pilot.add_argument("--out", type=Path, help="folder of runs and settings (default: runs/<data>-pilot)")


def _add_ingest(commands: Any) -> None:
    """Frames that come back from the line."""
    ingest = add_command(
        commands, "ingest", _once(_ingest), "gather frames of recordings and stations into one folder to train on"
    )
    ingest.add_argument(
        "sources",
        nargs="+",
        type=Path,
        metavar="FOLDER",
        help="a station's state folder, one of its frames/CAMERA folders, or a folder of `edge-dkm record`",
    )
    ingest.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    ingest.add_argument(
        "--since", type=_moment, metavar="TIME", help="captured at or after, as 2026-11-20 or with a time; UTC"
    )
    ingest.add_argument("--until", type=_moment, metavar="TIME", help="captured before")
    for name in ("verdict", "cluster", "camera"):
        ingest.add_argument(f"--{name}", action="append", default=[], help=f"only of this {name}; repeatable")
    ingest.add_argument("--min-novelty", type=float, metavar="SCORE", help="novelty_score at least")
    ingest.add_argument("--max-novelty", type=float, metavar="SCORE", help="novelty_score at most")
    ingest.add_argument("--limit", type=_count, metavar="N", help="at most so many, evenly spaced over the others")


def _moment(text: str) -> Any:
    from trainer.recordings import parse_time

    moment = parse_time(text)
    if moment is None:
        raise argparse.ArgumentTypeError(f"{text}, expected a date or time as 2026-11-20 or 2026-11-20T23:44:01Z")
    return moment


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}, expected a whole number of at least 1")
    return int(text)


def _add_run_and_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("data", help=PLACES)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")


def _fit(arguments: argparse.Namespace) -> int:
    from trainer import ranks
    from trainer.fitting import FitOptions, fit
    from trainer.loop import InterruptedTraining
    from trainer.progress import Terminal
    from trainer.provenance import novelty_sentence

    options = FitOptions(arguments.out, arguments.overrides, arguments.resume, Terminal())
    together = ranks.current()
    try:
        with ranks.joined() as together:
            run = fit(arguments.config, options)
    except (InterruptedTraining, KeyboardInterrupt) as interruption:
        # A second Ctrl-C, or one while images are read or results written, says nothing: the checkpoints before it are there.
        said = str(interruption) or "interrupted"
        again = [
            *(["torchrun", "...", "-m", "trainer"] if together.are_many else ["dkm-train"]),
            "fit",
            arguments.config,
            *(["--out", str(arguments.out)] if arguments.out else []),
            *(part for item in arguments.overrides for part in ("--set", item)),
            "--resume",
        ]
        if together.is_first:
            print(f"dkm-train: {said}; go on with: {shlex.join(again)}", file=sys.stderr)
        return INTERRUPTED
    if not together.is_first:
        return 0
    train, share = run.info["train"], run.metrics["largest_share"]
    lines = [
        f"run       {run.path}  ({train['minutes']:g} min, {train['n']} images, {train['skipped']} skipped)",
        "clusters  (training images) " + ", ".join(f"{row['name']} {row['n']}" for row in run.info["clusters"]),
        "metrics   " + ", ".join(f"{key} {value:.3f}" for key, value in run.metrics.items()),
        f"novelty   {novelty_sentence(run.info['novelty'])}",
        *(f"WARNING   {warning}" for warning in train["warnings"]),
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
    from trainer import ranks
    from trainer.artifact import load_run
    from trainer.evaluate import evaluate
    from trainer.progress import Terminal

    with ranks.joined() as together:
        reader = Terminal().read if together.is_first else iter
        result = evaluate(load_run(arguments.run, arguments.device), arguments.data, reader)
    if together.is_first:
        show(arguments.json, result.plain(), result.text())
    return 0


def _predict(arguments: argparse.Namespace) -> int:
    import json

    from trainer import ranks
    from trainer.artifact import load_run
    from trainer.evaluate import predict, sort_into
    from trainer.progress import Terminal

    with ranks.joined() as together:
        reader = Terminal().read if together.is_first else iter
        rows = predict(load_run(arguments.run, arguments.device), arguments.data, reader)
    if not together.is_first:
        return 0
    for row in rows:
        print(json.dumps(row.plain(), ensure_ascii=False) if arguments.json else row.text())
    if arguments.sort_into is not None:
        linked, copied = sort_into(rows, Path(arguments.data), arguments.sort_into)
        print(f"{linked} linked, {copied} copied into {arguments.sort_into}", file=sys.stderr)
    return 0


def _select_k(arguments: argparse.Namespace) -> int:
    from trainer.progress import Terminal
    from trainer.select_k import SelectOptions, parse_ks, select_k

    options = SelectOptions(parse_ks(arguments.k), arguments.seeds, arguments.out, arguments.overrides, Terminal())
    return _compare(arguments, lambda: select_k(arguments.config, options))


def _sweep(arguments: argparse.Namespace) -> int:
    from trainer.progress import Terminal
    from trainer.sweep import SweepOptions, sweep

    options = SweepOptions(
        arguments.methods.split(",") if arguments.methods else [],
        arguments.grid,
        arguments.search,
        arguments.seeds,
        arguments.out,
        arguments.overrides,
        Terminal(),
    )
    return _compare(arguments, lambda: sweep(arguments.config, options))


def _pilot(arguments: argparse.Namespace) -> int:
    from trainer.pilot import PilotOptions, pilot
    from trainer.progress import Terminal

    options = PilotOptions(arguments.k, arguments.weights, arguments.max_images, arguments.out, Terminal())
    return _compare(arguments, lambda: pilot(arguments.data, options))


def _compare(arguments: argparse.Namespace, compare: Callable[[], Any]) -> int:
    """Runs one of the commands that fit several times; what is complete is reused by the same command."""
    from trainer.loop import InterruptedTraining

    try:
        result = compare()
    except InterruptedTraining as interruption:
        print(f"dkm-train: {interruption}; the same command goes on from there", file=sys.stderr)
        return INTERRUPTED
    show(arguments.json, result.plain(), result.text())
    return 0


def _ingest(arguments: argparse.Namespace) -> int:
    from trainer.ingest import Wanted, ingest

    wanted = Wanted(
        arguments.since,
        arguments.until,
        arguments.verdict,
        arguments.cluster,
        arguments.camera,
        (arguments.min_novelty, arguments.max_novelty),
        arguments.limit,
    )
    result = ingest(arguments.sources, arguments.out, wanted)
    show(arguments.json, result.plain(), result.text())
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
