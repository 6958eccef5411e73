"""`python -m tests.runtimes MATERIAL`: the prepared material in every runtime, compared; exit code 0 only where all ran and all is as it should be."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.runtimes.compare import compare_case
from tests.runtimes.material import read_manifest
from tests.runtimes.report import Line, show
from tests.runtimes.runtime import ROOT, NotRunError, Runtime, ask, runtimes


def prove(material: Path, chosen: Sequence[Runtime]) -> tuple[list[Line], dict[str, str]]:
    """Asks the runtimes one after the other; returns a line per case, and which could not be asked, with the reason."""
    lines, not_run = [], {}
    for runtime in chosen:
        out = material / "answers" / runtime.name
        shutil.rmtree(out, ignore_errors=True)
        try:
            about = ask(runtime, material, out)
        except NotRunError as error:
            not_run[runtime.name] = str(error)
            continue
        lines += [Line(runtime, about, compare_case(material, out, case)) for case in read_manifest(material)]
    return lines, not_run


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="tests.runtimes", description=__doc__)
    parser.add_argument("material", type=Path, help="what tests.runtimes.prepare wrote")
    parser.add_argument("--environments", type=Path, default=ROOT / "build", metavar="DIR")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="newest, oldest, openvino, web")
    parser.add_argument("--allow-missing", nargs="*", default=(), metavar="NAME", help="these may be absent")
    arguments = parser.parse_args(argv)
    known = runtimes(arguments.environments.resolve())
    unknown = sorted({*(arguments.only or ()), *arguments.allow_missing} - set(known))
    if unknown:
        parser.error(f"no runtime {', '.join(unknown)}, expected {', '.join(known)}")
    chosen = [known[name] for name in arguments.only or known]
    lines, not_run = prove(arguments.material.resolve(), chosen)
    show(lines, not_run)
    wrong = [line for line in lines if not line.is_right]
    missing = sorted(set(not_run) - set(arguments.allow_missing))
    print(
        f"\n{len(lines) - len(wrong)} of {len(lines)} as they should be; runtimes not run: {', '.join(not_run) or 'none'}"
    )
    return 1 if wrong or missing or not lines else 0


if __name__ == "__main__":
    sys.exit(main())
