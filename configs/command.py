"""What the three command lines share: arguments, one clear line per error, exit codes. Imports nothing heavy, for the sake of --help.

Exit codes: 0 ok, 1 failure, 2 usage or settings, 3 model, 4 camera, 5 broker, 6 another process holds the state, 7 storage.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

DEBUG_VARIABLE = "EDGE_DKM_DEBUG"
USAGE = 2
TRAIN_LIBRARIES = ("torch", "onnx", "onnxscript", "safetensors", "scipy", "sklearn", "tqdm")  # of the extra `train`
INTERRUPTED = 130  # the shell's code for Ctrl-C

Handler = Callable[[argparse.Namespace], int]


class Parser(argparse.ArgumentParser):
    """argparse that names commands which are planned but not built, instead of calling them unknown."""

    planned: Sequence[str] = ()

    def error(self, message: str) -> NoReturn:
        for name in self.planned:
            if f"invalid choice: '{name}'" in message:
                message = f"{name} is not built yet"
        self.exit(2, f"{self.prog}: {message}\n")


def add_command(commands: Any, name: str, handler: Handler, text: str) -> argparse.ArgumentParser:
    """Adds a command with `--json`; `handler` gets the parsed arguments and returns the exit code."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(handler=handler)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """`--set a.b=c`, repeatable."""
    parser.add_argument(
        "--set",
        dest="overrides",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="override a setting, as train.seed=3; repeatable",
    )


def show(as_json: bool, value: Any, text: str) -> None:
    """Prints `value` as one JSON document, or `text`."""
    print(json.dumps(value, ensure_ascii=False, allow_nan=False, default=str) if as_json else text)


def guarded(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> int:
    """Parses, runs the command and turns every error into one line on stderr and an exit code. No traceback reaches a user."""
    arguments = parser.parse_args(argv)
    try:
        code: int = arguments.handler(arguments)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return _fail(parser.prog, "interrupted", INTERRUPTED)
    except BrokenPipeError:  # `| head`: the reader has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        return _report(parser.prog, error)


def _report(program: str, error: Exception) -> int:
    if os.environ.get(DEBUG_VARIABLE):
        traceback.print_exc()
    code = getattr(error, "exit_code", None)
    if isinstance(code, int):
        return _fail(program, str(error), code)
    if isinstance(error, ModuleNotFoundError) and error.name in TRAIN_LIBRARIES:
        return _fail(program, f"needs {error.name}, which is not installed: pip install 'edge-dkm[train]'", USAGE)
    if isinstance(error, OSError):
        return _fail(program, f"{error.filename or ''} {error.strerror or error}".strip(), 1)
    return _fail(
        program,
        f"internal error: {type(error).__name__}: {' '.join(str(error).split())[:300]} (please report it; {DEBUG_VARIABLE}=1 shows where)",
        1,
    )


def _fail(program: str, text: str, code: int) -> int:
    for line in text.splitlines():
        print(f"{program}: {line}", file=sys.stderr)
    return code
