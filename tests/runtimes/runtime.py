"""The runtimes that are proven: which program runs the material, what it needs, and where it is known to answer differently."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.runtimes.material import Case

ROOT = Path(__file__).parent.parent.parent
RUNNERS = Path(__file__).parent / "runners"
LIMIT_S = 3600


class NotRunError(Exception):
    """This runtime could not be asked: not set up, or its runner failed."""


@dataclass(frozen=True)
class Runtime:
    """`program` gets MATERIAL and OUT before `extra`. `limits`: resize modes it is known to answer differently, with the reason.

    A limit is strict: where such a mode agrees after all, the limit has to be taken out.
    """

    name: str
    program: tuple[str, ...]
    needs: tuple[Path, ...] = ()
    extra: tuple[str, ...] = ()
    made_by: str = ""
    limits: tuple[tuple[str, str], ...] = ()

    def limit(self, case: Case) -> str | None:
        """Why a difference in this case is known; None where there must be none."""
        return next((reason for mode, reason in self.limits if case.resize == mode and case.control is None), None)


def runtimes(environments: Path) -> dict[str, Runtime]:
    """By name, with their environments below a folder."""
    oldest, openvino = (environments / name / "bin" / "python" for name in ("oldest", "openvino"))
    packages = environments / "web" / "node_modules"
    ignored = "its CPU plugin reads `antialias` and ignores it (openvino#35893)"
    magnified = "its sums round otherwise, and the contrast of even surfaces magnifies that: a map by up to 1.3e-4 (allowed: 1e-4), no id"
    rounded = "it rounds the pixels of a uint8 Resize, onnxruntime truncates them"
    found = (
        Runtime("newest", (sys.executable, str(RUNNERS / "run_onnxruntime.py"))),
        Runtime(
            "oldest", (str(oldest), str(RUNNERS / "run_onnxruntime.py")), (oldest,), made_by="scripts/setup_oldest"
        ),
        Runtime(
            "openvino",
            (str(openvino), str(RUNNERS / "run_openvino.py")),
            (openvino,),
            made_by="scripts/setup_runtimes",
            limits=(("onnx antialiased", ignored), ("onnx linear", rounded)),
        ),
        Runtime(
            "web",
            (sys.executable, str(RUNNERS / "run_web.py")),
            (packages,),
            (str(packages),),
            "scripts/setup_runtimes",
            (("none, local contrast", magnified),),
        ),
    )
    return {runtime.name: runtime for runtime in found}


def ask(runtime: Runtime, material: Path, out: Path) -> dict[str, Any]:
    """Lets a runtime answer the whole material into `out`; returns what its runner says of itself.

    Raises:
        NotRunError: its environment is not there, or its runner ended early.
    """
    missing = [path for path in runtime.needs if not path.exists()]
    if missing:
        raise NotRunError(f"{missing[0]} is not there; {runtime.made_by} makes it and says why it could not")
    out.mkdir(parents=True, exist_ok=True)
    command = [*runtime.program, str(material), str(out), *runtime.extra]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotRunError(f"{command[0]}: {error}") from None
    if done.returncode != 0:
        raise NotRunError(f"its runner ended with exit code {done.returncode}: {done.stderr.strip()[-600:]}")
    return dict(json.loads((out / "runtime.json").read_text(encoding="utf-8")))
