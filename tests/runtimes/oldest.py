"""What must hold in the oldest onnxruntime, installed as the base install without torch: `python -m tests.runtimes.oldest MATERIAL`.

The command line of a real install (not of this source tree), the twelve lines of any language binding, and the edge's own tests.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from tests.runtimes.material import Case, read_manifest
from tests.runtimes.runtime import ROOT, RUNNERS

TESTS = ("test_inspector.py", "test_golden.py", "test_codebook.py", "test_decision.py")
# They train and export, which needs torch; a fixed frame size is proven by the models `frame` and `none`.
NEED_TORCH = ("test_a_fixed_size_graph_names_the_size_it_expects",)
WITH_BANK = "bank"  # of tests/runtimes/models.py
FOREIGN = ("torch", "onnx", "scipy", "sklearn", "safetensors", "pytest")


class OldestError(Exception):
    """Something that must hold does not; the text says what was run and what it said."""


def run(command: Sequence[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command outside the source tree, so that only what is installed can be imported."""
    kept = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "VIRTUAL_ENV"}}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=900, env={**kept, **environment})


def checked(done: subprocess.CompletedProcess[str], code: int = 0) -> str:
    """Standard output of a command that had to end with `code`."""
    if done.returncode != code:
        raise OldestError(
            f"{' '.join(map(str, done.args))} ended with {done.returncode}, expected {code}: {(done.stderr or done.stdout)[-1500:]}"
        )
    return done.stdout


class Station:
    """The base install in an environment of its own."""

    def __init__(self, environment: Path, folder: Path) -> None:
        self.python, self.program = str(environment / "bin/python"), str(environment / "bin/edge-dkm")
        self.folder = folder

    def check_install(self) -> str:
        """It is the base install, from a wheel, without the training stack."""
        program = f"""
import importlib.util, importlib.metadata as m, edge_dkm, json
found = [n for n in {FOREIGN!r} if importlib.util.find_spec(n)]
print(json.dumps([found, edge_dkm.__file__, {{d.name: d.version for d in m.distributions()}}]))
"""
        found, place, versions = json.loads(checked(run([self.python, "-c", program], self.folder)))
        if found or Path(place).is_relative_to(ROOT / "edge_dkm"):
            raise OldestError(f"the base install has {found or place}, expected neither torch nor this source tree")
        named = ("onnxruntime", "numpy", "opencv-python-headless", "pydantic", "paho-mqtt", "cryptography")
        return ", ".join(f"{name} {versions[name]}" for name in named)

    def json(self, *arguments: str, code: int = 0) -> Any:
        """One command with --json."""
        return json.loads(checked(run([self.program, *arguments, "--json"], self.folder), code).splitlines()[-1])

    def check_commands(self, model: Path, image: Path) -> str:
        """verify, score and bench on one model; a damaged model is refused."""
        checked(run([self.program, "verify", str(model), "--json"], self.folder))
        here = self.json("score", str(model), str(image))
        there = json.loads(
            checked(run([sys.executable, "-m", "edge_dkm", "score", str(model), str(image), "--json"], ROOT))
        )
        if not _alike(here, there):
            raise OldestError(f"edge-dkm score {model.name} gives {here}, the newest onnxruntime {there}")
        checked(run([self.program, "bench", str(model), "--frames", "20", "--json"], self.folder))
        damaged = self.folder / "damaged.onnx"
        damaged.write_bytes(model.read_bytes()[:-100])
        checked(run([self.program, "verify", str(damaged)], self.folder), code=3)
        return "verify, score, bench agree; a cut file is refused"

    def check_twelve_lines(self, model: Path, image: Path) -> str:
        """The same answer in both onnxruntimes."""
        script = [str(RUNNERS / "twelve_lines.py"), str(model), str(image)]
        answers = [json.loads(checked(run([python, *script], self.folder))) for python in (self.python, sys.executable)]
        (name, score, *rest), (other_name, other_score, *other_rest) = (a["answer"] for a in answers)
        if (name, rest) != (other_name, other_rest) or abs(score - other_score) > 1e-4 * max(1, score):
            raise OldestError(f"the twelve lines on {model.name} give {answers[0]} and {answers[1]}")
        if rest[1:] != [True, False]:
            raise OldestError(f"the threshold fed to {model.name} does not move the edge: {rest}")
        return f"{name} {score:.4f} in {answers[0]['onnxruntime']} and {answers[1]['onnxruntime']}"


def _alike(here: Any, there: Any) -> bool:
    """Numbers within 1e-4, everything else equal; times are not compared."""
    if isinstance(here, dict) and isinstance(there, dict):
        return here.keys() == there.keys() and all(_alike(here[k], there[k]) for k in here if not k.endswith("_ms"))
    if isinstance(here, list) and isinstance(there, list):
        return len(here) == len(there) and all(map(_alike, here, there))
    if isinstance(here, float) and isinstance(there, float):
        return abs(here - there) <= 1e-4 * max(1.0, abs(there))
    return bool(here == there)


def check_tests(environment: Path, model: Path, with_bank: Path) -> str:
    """The edge's own tests, from the source tree, with models exported by the newest versions."""
    paths = [str(ROOT / "tests/edge_dkm" / name) for name in TESTS]
    command = [str(environment / "bin/python"), "-m", "pytest", "-q", "-rs", "--noconftest"]
    command += ["-p", "tests.runtimes.exported_model", "-p", "no:cacheprovider", *paths]
    command += ["-k", " and ".join(f"not {name}" for name in NEED_TORCH)]
    exported = {"EDGE_DKM_EXPORTED": str(model), "EDGE_DKM_EXPORTED_BANK": str(with_bank)}
    done = run(command, ROOT, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT), **exported)
    return checked(done).strip().splitlines()[-1] + f"; not run: {', '.join(NEED_TORCH)} (trains)"


def write_image(material: Path, case: Case, folder: Path) -> Path:
    """The first golden image of a case as a picture file."""
    part = case.parts[0]
    shape = (part.height, part.width, 3)
    pixels = np.fromfile(material / part.frames, np.uint8, count=int(np.prod(shape)), offset=part.offset).reshape(shape)
    path = folder / f"{case.name}.png"
    cv2.imwrite(str(path), pixels)
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="tests.runtimes.oldest", description=__doc__)
    parser.add_argument("material", type=Path, help="what tests.runtimes.prepare wrote")
    parser.add_argument("--environments", type=Path, default=ROOT / "build", metavar="DIR")
    arguments = parser.parse_args(argv)
    material, environments = arguments.material.resolve(), arguments.environments.resolve()
    cases = [case for case in read_manifest(material) if case.control is None]
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        station = Station(environments / "oldest", folder)
        steps: list[tuple[str, Callable[[], str]]] = [("base install", station.check_install)]
        for case in cases:
            model, image = material / case.model, write_image(material, case, folder)
            steps.append((f"edge-dkm {case.name}", lambda m=model, i=image: station.check_commands(m, i)))
            steps.append((f"twelve lines {case.name}", lambda m=model, i=image: station.check_twelve_lines(m, i)))
        with_bank = next((case for case in cases if case.name == WITH_BANK), cases[0])
        models = material / cases[0].model, material / with_bank.model
        steps.append(("tests", lambda: check_tests(environments / "oldest-tests", *models)))
        for what, step in steps:
            try:
                print(f"ok   {what}: {step()}", flush=True)
            except (OldestError, OSError, ValueError, subprocess.TimeoutExpired) as error:
                failed += 1
                print(f"FAIL {what}: {error}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
