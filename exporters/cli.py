"""The command line `dkm-export`."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from configs.command import Parser, guarded, show

if TYPE_CHECKING:
    from exporters.int8 import Int8


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = Parser(
        prog="dkm-export",
        description="Fuse pre-processing, encoder, nearest centroid and novelty of a run into one verified ONNX file.",
    )
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("-o", "--out", type=Path, required=True, help="the model to write, as part.onnx")
    parser.add_argument(
        "--device", metavar="PROFILE", help="check that this device profile can run it (a shipped name or a YAML file)"
    )
    parser.add_argument("--frame", type=_frame, metavar="HxW", help="fix the input size (default: any size)")
    parser.add_argument(
        "--int8",
        action="store_true",
        help="quantise the encoder to int8, if that keeps the answers and is faster here; else fp32 is written, and why",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(handler=_export)
    return guarded(parser, argv)


def _frame(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match or not 1 <= int(match[1]) <= 16384 or not 1 <= int(match[2]) <= 16384:
        raise argparse.ArgumentTypeError(f"{text}, expected HEIGHTxWIDTH in pixels, as 480x640")
    return int(match[1]), int(match[2])


def _export(arguments: argparse.Namespace) -> int:
    from devices.profile import load_profile
    from exporters.export import ExportOptions, export_run
    from trainer.artifact import load_run
    from trainer.provenance import novelty_sentence

    profile = load_profile(arguments.device) if arguments.device else None
    exported = export_run(
        load_run(arguments.run), arguments.out, ExportOptions(arguments.frame, profile, arguments.int8)
    )
    lines = [
        f"model     {exported.path}  sha256 {exported.sha256[:12]}",
        f"verified  {exported.golden_images} golden images; PyTorch and onnxruntime differ by at most "
        f"{exported.parity.max_score_difference:.1e} in the score{_of_fp32(exported.int8)}",
        "clusters  "
        + ", ".join(
            f"{row['name']}{' = ' + row['verdict'] if row.get('verdict') else ''}" for row in exported.clusters
        ),
        f"novelty   {novelty_sentence(exported.novelty)}",
    ]
    if exported.rejected:
        lines.append(f"          calibrated without the rejected clusters {', '.join(exported.rejected)}")
    lines.append(f"drift     {exported.drift}")
    if exported.int8 is not None:
        lines.append(f"precision {_int8_sentence(exported.int8)}")
    if profile is not None and not profile.run_here:
        lines.append(
            f"device    {profile.title}: written from documentation, not run by this project; `edge-dkm verify` proves it on the device"
        )
    show(
        arguments.json,
        {
            "model": str(exported.path),
            "sha256": exported.sha256,
            "golden_images": exported.golden_images,
            "novelty": exported.novelty,
            "max_score_difference": exported.parity.max_score_difference,
            "clusters": exported.clusters,
            "drift": exported.drift,
            "quantization": exported.int8.plain() if exported.int8 else None,
        },
        "\n".join(lines),
    )
    return 0


def _of_fp32(int8: Int8 | None) -> str:
    return " (of the fp32 graph)" if int8 is not None and int8.accepted is not None else ""


def _int8_sentence(int8: Int8) -> str:
    if int8.report is None or int8.accepted is None:
        return f"fp32; int8 is not kept: {'; '.join(int8.reasons)}"
    report = int8.report
    rate = "" if report.rates is None else f", false rejects {report.rates.int8:.2%} (fp32 {report.rates.fp32:.2%})"
    return (
        f"int8: ids agree on {report.agreement:.2%} of {report.frames} held-out frames (worst cluster {report.cluster_agreement[report.worst_cluster]:.2%}), "
        f"scores correlate by {report.spearman:.4f}{rate}, {report.speed:.2f} times as fast as fp32 here"
    )


if __name__ == "__main__":
    sys.exit(main())
