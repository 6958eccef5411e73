from __future__ import annotations

import argparse

import pytest

from configs.command import Parser, add_command, guarded


def run(error: BaseException) -> int:
    """The exit code of a command that raises."""

    def handler(arguments: argparse.Namespace) -> int:
        raise error

    parser = Parser(prog="tool")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=argparse.ArgumentParser)
    add_command(commands, "go", handler, "goes")
    return guarded(parser, ["go"])


def test_an_edge_install_says_how_to_add_training(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(ModuleNotFoundError("No module named 'torch'", name="torch")) == 2
    assert capsys.readouterr().err == "tool: needs torch, which is not installed: pip install 'edge-dkm[train]'\n"


def test_a_module_of_ours_that_is_missing_is_a_defect(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(ModuleNotFoundError("No module named 'trainer.x'", name="trainer.x")) == 1
    assert "internal error: ModuleNotFoundError" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (KeyboardInterrupt(), 130, "tool: interrupted\n"),
        (PermissionError(13, "Permission denied", "/x"), 1, "tool: /x Permission denied\n"),
        (RuntimeError("odd\nthing"), 1, "tool: internal error: RuntimeError: odd thing (please report it"),
    ],
)
def test_every_error_is_one_line_and_an_exit_code(
    error: BaseException, code: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(error) == code
    assert capsys.readouterr().err.startswith(text)
