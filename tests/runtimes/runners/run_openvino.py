"""Runs a prepared folder in OpenVINO's own runtime, without onnxruntime; needs openvino and numpy. `run_openvino.py MATERIAL OUT`.

OpenVINO's reader makes constants of inputs that have an initialiser: threshold and codebook cannot be fed, so the head is computed
outside, from `embedding`.
"""

import functools
import sys
from pathlib import Path

import numpy as np
import openvino as ov
from head import head
from reading import PATCH_OUTPUTS, AnswerFile, attempt, batches, outputs_of, read_cases, read_tensors, write_runtime

# Without this, processors with bf16 compute in bf16: another model, with other answers.
PRECISION = {"INFERENCE_PRECISION_HINT": "f32"}


def run_case(material, case):
    core = ov.Core()
    model = core.read_model(str(Path(material) / case["model"]))
    names = [port.get_any_name() for port in model.inputs]
    if names != ["image"]:
        raise RuntimeError(f"OpenVINO's reader gives the inputs {names}, expected image alone: feed them")
    compiled = core.compile_model(model, "CPU", PRECISION)
    answers, names = AnswerFile(case), outputs_of(case["map_cells"])
    codebook = read_tensors(material, case["codebook"])
    for part in case["parts"]:
        feed = read_tensors(material, case["overrides"][part["overrides"]]) if part["overrides"] else None
        for frames in batches(material, part):
            result = compiled({"image": frames})
            outputs = {name: np.array(result[name]) for name in names}
            if feed is not None:
                threshold = {"novelty_threshold": np.ones(1, np.float32)}
                patches = {name: outputs[name] for name in PATCH_OUTPUTS if name in names}
                tensors = {**threshold, **codebook, **feed}
                outputs = {**head(outputs["embedding"], tensors, case["l2"], patches.get("patch_score")), **patches}
            answers.add(outputs)
    return answers


def main(material, out):
    for case in read_cases(material):
        attempt(out, case, functools.partial(run_case, material, case))
    about = {"overrides": "head outside the graph", "precision": PRECISION, "numpy": np.__version__}
    write_runtime(out, "OpenVINO", ov.__version__.split("-")[0], **about)


if __name__ == "__main__":
    main(*sys.argv[1:])
