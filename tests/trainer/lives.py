"""Processes that are killed with SIGKILL, and what they leave: `python -m tests.trainer.lives CONFIG OUT LIVES`.

`run`: `dkm-train fit` in one life after another, each ended at another moment. `moments`: one save of a checkpoint, ended at each of the
places where it touches the folder.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch._dynamo  # imported before the lives begin, as all else: torch's optimizers would do it in each

from tests.waiting import wait_until
from trainer import fitting
from trainer.checkpoint import FOLDER, NAME, Checkpoints, Position
from trainer.cli import main


def live(config: str, out: Path) -> None:
    """One life, in a process of its own; nothing may be said there."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    os._exit(main(["fit", config, "--out", str(out), "--resume"]))


def is_written(path: Path) -> Callable[[], bool]:
    before = path.stat().st_mtime_ns if path.exists() else 0
    return lambda: path.exists() and path.stat().st_mtime_ns != before


def run(config: str, out: Path, lives: int) -> dict[str, object]:
    """Kills all lives but the last one, at moments spread over what follows their first checkpoint."""
    rng, ended_itself, unfinished, moved = random.Random(0), 0, 0, 0
    folder = out / FOLDER
    for n in range(lives):
        written = is_written(folder / NAME)
        child = os.fork()
        if not child:
            live(config, out)
        if n % 3:  # every third one wherever it is, reading images or in its first stage
            wait_until(written)
        time.sleep(rng.uniform(0, 0.05))
        if os.waitpid(child, os.WNOHANG)[0]:
            ended_itself += 1
            continue
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        unfinished += bool(list(folder.glob(".*.tmp")))
        moved += not (folder / NAME).exists() and folder.exists()
    child = os.fork()
    if not child:
        live(config, out)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return {"ended_itself": ended_itself, "unfinished": unfinished, "moved": moved, "code": code}


def moments(out: Path) -> list[int]:
    """The step that is read after a kill just before the nth touch of the folder, for all n; then that after no kill. 2 was being written."""
    found = []
    for n in range(100):
        run = out / str(n)
        for step in (0, 1):
            save(run, step)
        child = os.fork()
        if not child:
            end_at_touch(run, n)
            save(run, 2)
            os._exit(0)
        was_killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        checkpoint = Checkpoints(run, 0, 1, print).load("", "")
        found.append(-1 if checkpoint is None else checkpoint.position.step)
        if not was_killed:
            break
    return found


def save(run: Path, step: int) -> None:
    checkpoints = Checkpoints(run, 0, 1, print)
    checkpoints.load("", "")
    assert checkpoints.save(Position(0, step, "", ""), {"model.a": torch.full((100,), float(step))})


def end_at_touch(folder: Path, number: int) -> None:
    touched = [0]

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        if event in {"open", "os.rename", "os.remove", "os.mkdir"} and str(folder) in str(arguments[0]):
            if touched[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)
            touched[0] += 1

    sys.addaudithook(watch)


if __name__ == "__main__":
    assert fitting and torch._dynamo
    out = Path(sys.argv[2])
    print(json.dumps({"moments": moments(out / "moments"), **run(sys.argv[1], out / "run", int(sys.argv[3]))}))
