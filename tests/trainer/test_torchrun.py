"""`torchrun -m trainer`, as typed: a process that is killed, Ctrl-C, and predictions of many."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.trainer.shapes import write_shapes
from tests.waiting import wait_until
from trainer import load_run

SETTINGS = """
data: {{path: {path}}}
preprocess: {{resize: none}}
encoder: {{name: conv, channels: [8, 16, 16], dim: 5}}
pretrain: {{epochs: 2}}
method: {{name: dec, n_clusters: 3, n_init: 3, epochs: {epochs}, tol: 0}}
novelty: none
train: {{batch_size: 64, device: cpu, checkpoint_every_s: 0}}
"""

pytestmark = pytest.mark.slow  # each start is two times the import of torch


def started(*words: object, restarts: int = 0) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", str(restarts)]
    return subprocess.Popen(
        [*command, "--standalone", "-m", "trainer", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def epochs_of(run: Path) -> int:
    path = run / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return sum(row["stage"] == "dec" for row in rows)


def workers_of(launcher: int) -> list[int]:
    """The processes that it started, by rank."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (entry / "environ").exists():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                environ = dict(part.partition("=")[::2] for part in (entry / "environ").read_text().split("\0"))
            except OSError:
                continue
            if parent == launcher and "LOCAL_RANK" in environ:
                found[int(environ["LOCAL_RANK"])] = int(entry.name)
    return [found[rank] for rank in sorted(found)]


def tensors(run: Path) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in load_run(run).model.state_dict().items()}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "shapes.yaml"
    path.write_text(SETTINGS.format(path=write_shapes(tmp_path / "shapes.npz", per_kind=60), epochs=60))
    return path


def test_a_killed_process_costs_the_steps_since_the_last_checkpoint_and_nothing_else(
    config: Path, tmp_path: Path
) -> None:
    run, by_hand = tmp_path / "run", tmp_path / "by-hand"
    launcher = started("fit", config, "--out", run, restarts=1)
    wait_until(lambda: epochs_of(run) >= 5, 120)
    os.kill(workers_of(launcher.pid)[1], signal.SIGKILL)
    wait_until(lambda: len(workers_of(launcher.pid)) == 0, 60)
    shutil.copytree(run, by_hand)
    _, said = launcher.communicate(timeout=200)
    assert launcher.returncode == 0, said
    assert "resuming stage dec" in said
    again = started("fit", config, "--out", by_hand, "--resume")
    _, said = again.communicate(timeout=200)
    assert again.returncode == 0, said
    ours, theirs = tensors(run), tensors(by_hand)
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_ctrl_c_saves_once_and_says_how_to_go_on(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    launcher = started("fit", config, "--out", run)
    wait_until(lambda: epochs_of(run) >= 2, 120)
    os.killpg(launcher.pid, signal.SIGINT)  # as a terminal does: to all of them
    _, said = launcher.communicate(timeout=60)
    assert launcher.returncode != 0
    assert said.count("go on with: torchrun ... -m trainer fit") == 1, said
    assert not (run / "model.json").exists() and (run / "checkpoints" / "last.safetensors").is_file()


def test_predictions_of_two_processes_are_those_of_one_in_order(config: Path, tmp_path: Path) -> None:
    run, images = tmp_path / "run", tmp_path / "shapes.npz"
    words = ["fit", config, "--out", run, "--set", "method.epochs=2"]
    subprocess.run([sys.executable, "-m", "trainer", *map(str, words)], check=True, capture_output=True)
    alone = subprocess.run(
        [sys.executable, "-m", "trainer", "predict", str(run), str(images)], check=True, capture_output=True, text=True
    )
    together = started("predict", run, images)
    rows, said = together.communicate(timeout=200)
    assert together.returncode == 0, said
    assert rows == alone.stdout and len(rows.splitlines()) == 180
