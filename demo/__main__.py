"""`make demo`: films, records, trains, exports and runs a line as a user would, with the same commands, then judges it.

The film to learn from holds three part types and a few scratched ones, unlabelled. The film to be judged on also holds stains and
a foreign object, which the model never saw. Exit code 0: at least 90 % of what was planted is flagged, at most 3 % of the good
parts are, and every published message was received.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from demo.film import counts, film
from demo.judge import judge
from devices.sources.synthetic import ConveyorOptions

OUT = Path("demo/out")
LEARN = ConveyorOptions(parts=1000, speed_px=12, scratch=0.002)
JUDGE = ConveyorOptions(parts=460, speed_px=12, scratch=0.03, stain=0.03, foreign=0.02)


def main() -> int:
    """Runs the demo; returns the exit code."""
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="of both films (default: 1)")
    seed = parser.parse_args().seed
    started_s = time.monotonic()
    shutil.rmtree(OUT, ignore_errors=True)
    port = free_port()

    say("1", "film two conveyors: one to learn from, one to be judged on")
    learned = film(OUT / "learn.mp4", replace(LEARN, seed=2 * seed))
    planted = film(OUT / "judge.mp4", replace(JUDGE, seed=2 * seed + 1))
    print(f"    learn.mp4  {counts(learned)}\n    judge.mp4  {counts(planted)}")

    say("2", "record the parts of the first film, as the line will see them")
    run("edge-dkm", "record", "demo", "--set", f"cameras.belt.source=file:{OUT}/learn.mp4", "--out", f"{OUT}/frames")
    say("3", "learn: no labels")
    run("dkm-train", "fit", "demo", "--out", f"{OUT}/run")
    say("4", "name the clusters, as an engineer does who has looked at report.html")
    name_clusters(OUT / "run", [part.kind for part in learned])
    say("5", "export one ONNX file and prove it")
    run("dkm-export", f"{OUT}/run", "-o", f"{OUT}/part.onnx")
    run("edge-dkm", "verify", f"{OUT}/part.onnx")
    say("6", "run the line with a broker of its own, and a subscriber beside it")
    report, messages = run_line(port)
    verdicts = judge(planted, messages, report)
    print(verdicts.table())
    print(f"\n{'PASS' if verdicts.passed else 'FAIL'} in {time.monotonic() - started_s:.0f} s (seed {seed})")
    if verdicts.passed:
        print(next_steps())
    return 0 if verdicts.passed else 1


def say(step: str, text: str) -> None:
    """A heading."""
    print(f"\n[{step}] {text}", flush=True)


def command(*words: str) -> list[str]:
    """The installed command beside this Python, so that no activated environment is needed."""
    return [str(Path(sys.executable).with_name(words[0])), *words[1:]]


def run(*words: str) -> None:
    """Shows a command and runs it; ends the demo where it fails."""
    print(f"    $ {' '.join(words)}", flush=True)
    done = subprocess.run(command(*words), check=False)
    if done.returncode:
        sys.exit(f"FAIL: {words[0]} {words[1]} ended with exit code {done.returncode}")


def run_line(port: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Runs line and subscriber; returns the line's report and every payload that the subscriber got."""
    override = ("--set", f"mqtt.port={port}")
    print(
        f"    $ edge-dkm watch demo --json {' '.join(override)} &\n    $ edge-dkm run demo --json {' '.join(override)}",
        flush=True,
    )
    received = OUT / "received.jsonl"
    with (
        received.open("w") as file,
        subprocess.Popen(
            command("edge-dkm", "watch", "demo", "--json", "--wait", "60", *override),
            stdout=file,
            stderr=subprocess.DEVNULL,
        ) as watcher,
    ):
        line = subprocess.run(
            command("edge-dkm", "run", "demo", "--json", *override), stdout=subprocess.PIPE, text=True, check=False
        )
        with contextlib.suppress(subprocess.TimeoutExpired):
            watcher.wait(10)  # it ends when the broker does
        watcher.terminate()
    if line.returncode:
        sys.exit(f"FAIL: edge-dkm run ended with exit code {line.returncode}")
    return json.loads(line.stdout), [json.loads(text)["payload"] for text in received.read_text().splitlines()]


def name_clusters(folder: Path, kinds: list[str]) -> None:
    """Gives each cluster the name of the part type that most of its images show. Names change no cluster and no score."""
    with (folder / "assignments.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    shown: dict[int, Counter[str]] = {}
    for row, kind in zip(rows, kinds, strict=False):
        shown.setdefault(int(row["cluster"]), Counter())[kind] += 1
    leading = {cluster: kind_counts.most_common(1)[0] for cluster, kind_counts in sorted(shown.items())}
    is_unique = len({kind for kind, _ in leading.values()}) == len(leading)
    lines = ["clusters:"]
    for cluster, (kind, n) in leading.items():
        print(f"    cluster {cluster}: {n} of {shown[cluster].total()} are {kind}")
        lines.append(f"  {cluster}: {{name: {kind if is_unique else f'{kind}-{cluster}'}}}")
    (folder / "labels.yaml").write_text("\n".join(lines) + "\n")


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def next_steps() -> str:
    """What to try with one's own parts."""
    return f"""
Look at {OUT}/run/report.html, then try your own parts:
  a folder of images      dkm-train scan FOLDER && dkm-train fit demo --set data.path=FOLDER --out runs/mine
  a camera                edge-dkm cameras; copy configs/line/demo.yaml, set source: usb:0 and the roi, then
                          edge-dkm record mine.yaml --out frames --parts 200 && dkm-train fit demo --set data.path=frames --out runs/mine
  the model on the line   dkm-export runs/mine -o part.onnx && edge-dkm check mine.yaml && edge-dkm run mine.yaml"""


if __name__ == "__main__":
    sys.exit(main())
