"""OpenVINO in bf16 against onnxruntime's CPU provider in fp32: the whole graph, ROI 448x448, the two in turns of some runs.

bf16 pays where the processor multiplies it in tiles (AMX, `amx_bf16` in /proc/cpuinfo); elsewhere the figure is stated and nothing is
asked. The models are exported here with `--frame 448x448`: an antialiased Resize OpenVINO would answer otherwise (docs/runtimes.md), and a batch
of one is fixed there. It may live in an environment of its own:

python -m benchmarks.edge.openvino_bf16 [--python VENV/bin/python] [--rounds N]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROUNDS, RUNS = 30, 15  # runs of one engine after the other: as on a line, it finds its own weights in the cache
THREADS, ROI_PX = 2, 448
CPU, BF16, FP32 = "onnxruntime fp32", "OpenVINO bf16", "OpenVINO fp32"
FETCHED = ["cluster_id", "novelty_score", "embedding"]


def has_amx() -> bool:
    """Whether the processor multiplies bf16 in tiles."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "amx_bf16" in cpuinfo.read_text().split()


def measure(model: str, rounds: int) -> dict[str, object]:
    """In an environment with openvino and onnxruntime; nothing else of ours is needed."""
    import onnxruntime as ort
    import openvino

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads, options.inter_op_num_threads = THREADS, 1
    options.add_session_config_entry(
        "session.force_spinning_stop", "1"
    )  # else its threads wait busily, on the other's cores
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    core = openvino.Core()
    compiled = {}
    for name, precision in ((BF16, "bf16"), (FP32, "f32")):
        hints = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": THREADS, "PERFORMANCE_HINT": "LATENCY"}
        graph = core.read_model(model)
        graph.reshape({"image": [1, ROI_PX, ROI_PX, 3]})
        compiled[name] = core.compile_model(graph, "CPU", hints).create_infer_request()
    image = np.random.default_rng(0).integers(0, 256, (1, ROI_PX, ROI_PX, 3), dtype=np.uint8)
    steps = {CPU: lambda: session.run(FETCHED, {"image": image})}
    steps |= {
        name: lambda r=request: r.infer({"image": image}, share_inputs=True) for name, request in compiled.items()
    }
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for n in range(1 + rounds):
        for name, step in steps.items():
            times = []
            for _ in range(RUNS):
                started_s = time.perf_counter()
                step()
                times.append((time.perf_counter() - started_s) * 1000)
            if n:
                taken[name].append(float(np.median(times)))
    embedding = session.run(["embedding"], {"image": image})[0]
    differences = {
        name: float(
            np.abs(np.asarray(request.infer({"image": image})["embedding"]) - embedding).max() / np.abs(embedding).max()
        )
        for name, request in compiled.items()
    }
    return {"taken": taken, "differences": differences}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", default=sys.executable, help="an interpreter that has openvino and onnxruntime")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.rounds)))
        return
    from benchmarks.edge.encoders import ENCODERS, inspector_of, run_of
    from benchmarks.table import show_table
    from exporters.export import ExportOptions

    rows: list[list[object]] = []
    for name in ENCODERS:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "part.onnx"
            inspector_of(run_of(name, Path(folder)), path, ExportOptions(frame=(ROI_PX, ROI_PX)))
            words = [arguments.python, __file__, "--measure", str(path), "--rounds", str(arguments.rounds)]
            done = subprocess.run(
                words, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""}, check=False
            )
        if done.returncode:
            sys.exit(
                f"{arguments.python} cannot measure: {done.stderr.strip().splitlines()[-1]}; --python names one with openvino"
            )
        seen = json.loads(done.stdout.splitlines()[-1])
        taken = {step: np.array(values) for step, values in seen["taken"].items()}
        medians = [float(np.median(taken[step])) for step in (CPU, FP32, BF16)]
        ratio = float(np.median(taken[CPU] / taken[BF16]))
        asked = ">= 4" if has_amx() else "none: no AMX"
        differs = " / ".join(f"{seen['differences'][step]:.1e}" for step in (FP32, BF16))
        rows.append([name, *medians, ratio, differs, asked])
    title = f"whole graph, ROI {ROI_PX}x{ROI_PX}, median of {arguments.rounds} rounds of {RUNS} runs, two threads, AMX {'present' if has_amx() else 'absent'}"
    header = [
        "network",
        f"{CPU}, ms",
        f"{FP32}, ms",
        f"{BF16}, ms",
        "times faster",
        "embedding differs by (fp32 / bf16, of its largest)",
        "asked",
    ]
    show_table(title, header, rows)


if __name__ == "__main__":
    main()
