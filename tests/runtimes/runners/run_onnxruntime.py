"""Runs a prepared folder in the onnxruntime of this environment; needs onnxruntime and numpy. `run_onnxruntime.py MATERIAL OUT [PROVIDER]`."""

import functools
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
from reading import AnswerFile, attempt, batches, outputs_of, read_cases, read_tensors, write_runtime


def run_case(material, case, provider):
    options = ort.SessionOptions()
    options.log_severity_level = 3  # else a warning per overridable input
    session = ort.InferenceSession(str(Path(material) / case["model"]), options, providers=[provider])
    if session.get_providers()[0] != provider:
        raise RuntimeError(f"onnxruntime chose {session.get_providers()}, expected {provider}")
    answers, names = AnswerFile(case), list(outputs_of(case["map_cells"]))
    for part in case["parts"]:
        feed = read_tensors(material, case["overrides"][part["overrides"]]) if part["overrides"] else {}
        for frames in batches(material, part):
            values = session.run(names, {"image": frames, **feed})
            answers.add(dict(zip(names, values)))
    return answers


def main(material, out, provider="CPUExecutionProvider"):
    for case in read_cases(material):
        attempt(out, case, functools.partial(run_case, material, case, provider))
    write_runtime(out, "onnxruntime", ort.__version__, provider=provider, overrides="inputs", numpy=np.__version__)


if __name__ == "__main__":
    main(*sys.argv[1:])
