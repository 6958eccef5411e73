"""The command line `edge-dkm`. Heavy modules are imported inside the commands: `--help` answers at once."""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.command import Parser, add_command, add_overrides, guarded, show
from edge_dkm.cli_station import add_station_commands
from edge_dkm.families.cli import add_families_command
from edge_dkm.service.leaving import ends_with

if TYPE_CHECKING:
    from edge_dkm.checks import Finding

PLANNED = ("init", "model")
SCHEMAS = (
    *("config", "result", "gap", "status", "info", "state", "health", "camera"),
    *("drift", "alarm", "cmd", "reply", "ack"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    os.environ.setdefault(
        "OPENCV_IO_MAX_IMAGE_PIXELS", "100000000"
    )  # before cv2 is loaded; camera processes have it too
    parser = Parser(
        prog="edge-dkm", description="Inspect parts with an exported model and publish every result over MQTT."
    )
    parser.planned = PLANNED
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=argparse.ArgumentParser
    )

    run = add_command(commands, "run", _run, "run a line: cameras -> model -> MQTT, until stopped")
    _add_line(run)
    run.add_argument("--max-parts", type=_positive, metavar="N", help="stop after N results")
    run.add_argument("--log", choices=("text", "json"), default="text", help="style of the log on stderr")

    record = add_command(commands, "record", _record, "record training frames by a line's camera, ROI and trigger")
    _add_line(record)
    record.add_argument("--out", type=Path, required=True, metavar="DIR")
    record.add_argument("--camera", metavar="NAME", help="which camera, where the line has several")
    record.add_argument("--parts", type=_positive, metavar="N", help="stop after N parts")
    record.add_argument(
        "--frames",
        choices=("one", "all"),
        default="one",
        help="one frame per part, or every frame with a part in the region",
    )

    _add_model_commands(commands)
    check = add_command(commands, "check", _check, "settings, model, cameras and broker of a line, one line each")
    _add_line(check)

    watch = add_command(commands, "watch", _watch, "show what a station publishes")
    _add_line(watch)
    watch.add_argument("--count", type=_positive, metavar="N", help="stop after N messages")
    watch.add_argument(
        "--wait", type=float, default=10.0, metavar="SECONDS", help="how long to wait for the broker (default: 10)"
    )

    add_station_commands(commands)
    add_families_command(commands)
    add_command(commands, "cameras", _cameras, "list the video devices of this machine")
    add_command(commands, "doctor", _doctor, "look over this machine")

    schema = add_command(commands, "schema", _schema, "JSON Schema of the line settings or of a message")
    schema.add_argument("name", choices=SCHEMAS)
    return ends_with(guarded(parser, argv))


def _add_model_commands(commands: Any) -> None:
    """Commands that need a model and no line."""
    score = add_command(commands, "score", _score, "one JSON line per image")
    score.add_argument("model")
    score.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    score.add_argument("--roi", type=_box, metavar="X,Y,W,H", help="cut this out of each image first")

    verify = add_command(commands, "verify", _verify, "prove a model by its golden images on this device")
    verify.add_argument("model")
    which = verify.add_mutually_exclusive_group()
    which.add_argument("--device", default="cpu", metavar="PROFILE", help="a shipped profile or a YAML (default: cpu)")
    which.add_argument("--all", action="store_true", help="every shipped profile whose providers this machine has")
    verify.add_argument("--cache", type=Path, metavar="DIR", help="folder of compiled models")

    warmup = add_command(commands, "warmup", _warmup, "compile a model ahead of time, so that a line starts at once")
    warmup.add_argument("model", help="a model, or a line file: its models, device and cache")
    warmup.add_argument("--device", metavar="PROFILE", help="with a model (default: cpu)")
    warmup.add_argument(
        "--cache", type=Path, metavar="DIR", help="with a model: the folder to fill; a line's is STATE/cache"
    )

    bench = add_command(commands, "bench", _bench, "how fast this device runs a model")
    bench.add_argument("model")
    bench.add_argument("--device", default="cpu", metavar="PROFILE")
    bench.add_argument(
        "--size",
        type=_size,
        metavar="WxH",
        help="frame size (default: the training's, or 224x224 where that had several)",
    )
    bench.add_argument("--frames", type=_positive, default=200, metavar="N")
    bench.add_argument(
        "--state",
        type=Path,
        metavar="DIR",
        help="a folder on the disk that results are to be committed to (default: temporary files)",
    )


def _add_line(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("line", metavar="LINE.yaml", help="a line file, or a shipped name such as demo")
    add_overrides(parser)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}, expected a whole number of at least 1")
    return int(text)


def _box(text: str) -> tuple[int, int, int, int]:
    match = re.fullmatch(r"(\d+),(\d+),([1-9]\d*),([1-9]\d*)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text}, expected X,Y,WIDTH,HEIGHT in pixels")
    x, y, width, height = (int(v) for v in match.groups())
    return x, y, width, height


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text}, expected WIDTHxHEIGHT in pixels, as 640x480")
    return int(match[1]), int(match[2])


def _log_to_stderr() -> None:
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")


def _run(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict

    import cv2

    from edge_dkm.service.state_log import set_up
    from edge_dkm.settings import load_line
    from edge_dkm.supervisor import run_line

    set_up(arguments.log)
    cv2.setNumThreads(1)  # what looks at pictures here is small, and its pool would take the cores from the inspection
    report = run_line(load_line(arguments.line, arguments.overrides), arguments.max_parts, own_process=True)
    show(arguments.json, asdict(report), report.text())
    return 0


def _record(arguments: argparse.Namespace) -> int:
    from edge_dkm.recorder import RecordOptions, record
    from edge_dkm.settings import load_line

    _log_to_stderr()
    done = record(
        load_line(arguments.line, arguments.overrides),
        RecordOptions(arguments.out, arguments.camera, arguments.parts, arguments.frames),
    )
    plain = {"folder": str(done.folder), "parts": done.parts, "frames": done.frames, "faulty": done.faulty}
    show(
        arguments.json,
        plain,
        f"recorded  {done.frames} frames of {done.parts} parts in {done.folder}"
        + (f", {done.faulty} faulty" if done.faulty else "")
        + (f"; the source ended before {arguments.parts}" if done.parts < (arguments.parts or 0) else ""),
    )
    return 0 if done.frames else 1


def _score(arguments: argparse.Namespace) -> int:
    from devices.errors import CameraError
    from devices.frame import Cropper
    from devices.sources.folder import read_image
    from edge_dkm.errors import FrameError
    from edge_dkm.inspector import Inspector

    failures = 0
    crop = Cropper(arguments.roi)
    with Inspector(arguments.model) as inspector:
        for path in arguments.images:
            try:
                frame = crop(read_image(path))
                if frame.fault is not None:
                    raise FrameError(frame.fault.code, frame.fault.detail)
                result = inspector.inspect(frame.image)
            except (FrameError, CameraError) as error:  # this image's failure; the next one may be read
                failures += 1
                print(
                    json.dumps(
                        {"file": str(path), "verdict": "error", "error": {"code": error.code, "detail": error.detail}},
                        ensure_ascii=False,
                    )
                )
                continue
            print(
                json.dumps(
                    {
                        "file": str(path),
                        "cluster": {"id": result.cluster.id, "name": result.cluster.name},
                        "verdict": result.verdict,
                        "reason": result.reason,
                        "distance": round(result.distance, 6),
                        "novelty_score": round(result.novelty_score, 6),
                        "p_value": round(result.p_value, 6),
                        "is_novel": result.is_novel,
                        **({} if result.patch_score is None else {"patch_score": round(result.patch_score, 6)}),
                    },
                    ensure_ascii=False,
                )
            )
    return 1 if failures else 0


def _verify(arguments: argparse.Namespace) -> int:
    from edge_dkm.verification import not_installed, prove, prove_all

    if not arguments.all:
        proof = prove(arguments.model, arguments.device, arguments.cache)
        show(arguments.json, proof.plain(), proof.text())
        return 0
    proofs = []
    for proof in prove_all(arguments.model, arguments.cache):
        proofs.append(proof)
        if not arguments.json:
            print(proof.text(), flush=True)
    missing = not_installed()
    show(
        arguments.json,
        {"profiles": [proof.plain() for proof in proofs], "not_installed": missing},
        f"not here  {', '.join(missing) or 'none'}",
    )
    return 3 if any(proof.disagrees for proof in proofs) or not any(proof.report for proof in proofs) else 0


def _warmup(arguments: argparse.Namespace) -> int:
    from edge_dkm.errors import UsageError
    from edge_dkm.models import runtime_of
    from edge_dkm.settings import load_line
    from edge_dkm.verification import line_models, warm

    _log_to_stderr()
    is_line = not arguments.model.endswith(".onnx")
    if is_line and (arguments.device or arguments.cache):
        raise UsageError(
            f"{arguments.model} is a line file, whose device and cache are its own; leave out --device and --cache"
        )
    if is_line:
        settings = load_line(arguments.model)
        device, (models, runtime) = settings.device, line_models(settings)
    else:
        device, models = arguments.device or "cpu", [arguments.model]
        runtime = runtime_of(device, strict=True, cache=arguments.cache)
    rows = []
    for model, proof in zip(models, warm(models, device, runtime), strict=True):
        rows.append({"model": model, **proof.plain()})
        if not arguments.json and proof.ran is not None:
            where = (
                f"kept in {proof.ran.cache}"
                if proof.ran.cache
                else "nothing to keep: this device compiles nothing, or has no --cache"
            )
            print(
                f"warm      {model} on {proof.title} after {proof.ran.compile_s:.1f} s, {where}\n{proof.text()}",
                flush=True,
            )
    if arguments.json:
        show(True, rows, "")
    return 0


def _check(arguments: argparse.Namespace) -> int:
    from edge_dkm.checks import check_line
    from edge_dkm.settings import load_line

    return _say(check_line(load_line(arguments.line, arguments.overrides)), arguments.json)


def _doctor(arguments: argparse.Namespace) -> int:
    from edge_dkm.checks import examine

    return _say(examine(), arguments.json)


def _say(findings: Iterable[Finding], as_json: bool) -> int:
    """Prints findings as they come; the exit code is that of the first failure."""
    code = 0
    rows = []
    for finding in findings:
        rows.append({"what": finding.what, "detail": finding.detail, "ok": finding.exit_code == 0})
        code = code or finding.exit_code
        if not as_json:
            print(finding.text(), flush=True)
    if as_json:
        show(True, rows, "")
    return code


def _bench(arguments: argparse.Namespace) -> int:
    from edge_dkm.bench import BenchOptions, bench
    from edge_dkm.inspector import Inspector
    from edge_dkm.models import runtime_of

    with Inspector(arguments.model, runtime=runtime_of(arguments.device, strict=True)) as inspector:
        report = bench(inspector, BenchOptions(arguments.size, arguments.frames, arguments.state))
    show(arguments.json, report.plain(), report.text())
    return 0


def _watch(arguments: argparse.Namespace) -> int:
    from edge_dkm.settings import load_line
    from edge_dkm.watch import describe, watch

    settings = load_line(arguments.line, arguments.overrides)
    seen = 0

    def show_one(topic: str, payload: bytes) -> bool:
        nonlocal seen
        seen += 1
        plain = {"topic": topic, "payload": json.loads(payload)} if arguments.json else None
        print(
            json.dumps(plain, ensure_ascii=False) if plain else describe(topic, payload, settings.base_topic),
            flush=True,
        )
        return arguments.count is None or seen < arguments.count

    watch(settings, show_one, arguments.wait)
    return 0


def _cameras(arguments: argparse.Namespace) -> int:
    from devices.sources.usb import list_devices

    rows = list_devices()
    text = "\n".join(f"usb:{row.address}  {row.name}  {row.size[0]}x{row.size[1]}" for row in rows)
    show(
        arguments.json,
        [{"source": f"usb:{row.address}", "name": row.name, "w": row.size[0], "h": row.size[1]} for row in rows],
        text or "no video devices; network cameras are not listed (source: rtsp://...), and synthetic: needs none",
    )
    return 0 if rows else 4


def _schema(arguments: argparse.Namespace) -> int:
    from edge_dkm.message_schema import json_schema
    from edge_dkm.settings import LineSettings

    schema = LineSettings.model_json_schema() if arguments.name == "config" else json_schema(f"dkm.{arguments.name}/1")
    print(json.dumps(schema, indent=1, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
