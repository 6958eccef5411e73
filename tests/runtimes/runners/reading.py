"""What every Python runner shares: the prepared folder's layout, with numpy alone. It must run under numpy 1.26 as well as the newest."""

import json
import platform
from pathlib import Path

import numpy as np

# Little-endian on disk, so that JavaScript reads and writes the same files.
OUTPUTS = {
    "cluster_id": "<i8",
    "distance": "<f4",
    "novelty_score": "<f4",
    "p_value": "<f4",
    "is_novel": "|u1",
    "distances": "<f4",
    "embedding": "<f4",
}
PATCH_OUTPUTS = {"patch_score": "<f4", "novelty_map": "<f4"}  # of a model with a bank


def outputs_of(map_cells):
    """Names and types of a case's outputs; `map_cells`: how many cells its novelty_map has, 0 without a bank."""
    return {**OUTPUTS, **PATCH_OUTPUTS} if map_cells else OUTPUTS


def read_cases(material):
    """The cases of a prepared folder, in order."""
    return json.loads((Path(material) / "manifest.json").read_text(encoding="utf-8"))["cases"]


def read_tensors(material, tensors):
    """Named float32 tensors that a case refers to, as a codebook or an override set."""
    return {
        name: np.fromfile(Path(material) / entry["file"], "<f4").reshape(entry["shape"])
        for name, entry in tensors.items()
    }


def batches(material, part):
    """The frames of one part of a case, (batch, H, W, 3) uint8 at a time; only one batch is held in memory."""
    shape = (part["count"], part["height"], part["width"], 3)
    frames = np.memmap(Path(material) / part["frames"], np.uint8, mode="r", offset=part["offset"], shape=shape)
    for start in range(0, part["count"], part["batch"]):
        yield np.ascontiguousarray(frames[start : start + part["batch"]])


class AnswerFile:
    """Collects one case's answers and writes a file per output."""

    def __init__(self, case):
        self._outputs = outputs_of(case["map_cells"])
        self._values = {name: [] for name in self._outputs}

    def add(self, outputs):
        """One run's outputs by name."""
        for name in self._outputs:
            self._values[name].append(np.asarray(outputs[name]))

    def write(self, folder):
        """Makes `folder` with a `<output>.bin` each."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, dtype in self._outputs.items():
            np.concatenate(self._values[name]).astype(dtype).tofile(folder / (name + ".bin"))


def attempt(out, case, run):
    """Runs one case; a runtime that cannot read or run the file says so in `error.txt`, and the next case follows."""
    folder = Path(out) / case["name"]
    try:
        run().write(folder)
    except Exception as error:  # noqa: BLE001  every runtime raises types of its own
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "error.txt").write_text(str(error).strip() or type(error).__name__, encoding="utf-8")


def write_runtime(out, name, version, **more):
    """`runtime.json`: what really ran."""
    system = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    about = {"runtime": name, "version": version, "platform": system, **more}
    (Path(out) / "runtime.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
