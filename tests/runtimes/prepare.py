"""Makes the material: `python -m tests.runtimes.prepare DIR [model.onnx ...]`. Without models it trains and exports its own (models.py)."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from edge_dkm import Inspector
from edge_dkm.contract import PIXELS
from edge_dkm.golden import Golden, load_golden
from edge_dkm.model_file import digest_path, golden_path
from tests.runtimes.further import SIZES, further_frames
from tests.runtimes.material import Case, Part, Tensors, write_manifest, write_tensors
from tests.runtimes.models import RECIPES, SQUEEZENETS, export_models
from tests.runtimes.runners.reading import AnswerFile, batches, outputs_of, read_tensors

FURTHER = 1000
CONTROLLED = "none"  # the model that is damaged for the controls: the one every runtime answers alike
CONTROL_FRAMES = 60
BATCH = 8


def prepare(folder: Path, models: Sequence[Path], further: int = FURTHER) -> list[Case]:
    """Fills an empty or missing folder for these exported models; every model needs its golden images beside it."""
    for sub in ("models", "frames", "expected"):
        (folder / sub).mkdir(parents=True, exist_ok=True)
    cases = [_make_case(folder, model, further) for model in models]
    controlled = next((case for case in cases if case.name == CONTROLLED), cases[0])
    cases += [_nudged(folder, controlled), _exchanged(folder, controlled)]
    write_manifest(folder, cases)
    return cases


def _make_case(folder: Path, model: Path, further: int) -> Case:
    for path in (model, golden_path(model), digest_path(model)):
        if path.exists():
            shutil.copy(path, folder / "models" / path.name)
    with Inspector(model) as inspector:
        golden = load_golden(golden_path(model), inspector.metadata.golden_sha256)
        sets = _override_sets(inspector, golden)
        spec, name = inspector.metadata.input, model.stem
        fixed = (spec.h, spec.w) if spec.h is not None and spec.w is not None else None
        case = Case(
            name,
            f"models/{model.name}",
            _resize(inspector),
            inspector.metadata.precision,
            golden.tolerance,
            inspector.metadata.n_clusters,
            inspector.metadata.embed_dim,
            inspector.metadata.l2,
            write_tensors(folder, f"{name}-base", golden.codebook),
            {key: write_tensors(folder, f"{name}-{key}", tensors) for key, tensors in sets.items()},
            [*_golden_parts(folder, name, golden, tuple(sets)), *_further_parts(folder, fixed, further)],
            map_cells=_map_cells(inspector, golden),
        )
        _expect(folder, case, inspector, golden)
    return case


def _map_cells(inspector: Inspector, golden: Golden) -> int:
    if not inspector.metadata.has_patches:
        return 0
    return int(inspector.run(golden.images[0][None], ("novelty_map",), overrides={})["novelty_map"].size)


def _resize(inspector: Inspector) -> str:
    """How the graph resizes. `onnx` is said only where there is a Resize operator: an exact step down may be done by convolutions."""
    steps = {op["op"]: op for op in json.loads(inspector.metadata.raw["dkm.preprocess"])}
    step = steps["resize"]
    if step["mode"] != "onnx":
        return f"{step['mode']}, local contrast" if "local_contrast" in steps else str(step["mode"])
    by_tensor = {name: n for n in onnx.load_model_from_string(inspector.file.data).graph.node for name in n.output}
    kinds, waiting = set(), [PIXELS]
    while waiting:  # a bank and the local contrast have Resize operators of their own, behind the pixels
        node = by_tensor.get(waiting.pop())
        if node is not None:
            kinds.add(node.op_type)
            waiting.extend(node.input)
    kind = "antialiased" if step["antialias"] else "linear"
    return f"{'onnx' if 'Resize' in kinds else 'convolution'} {kind}"


def _override_sets(inspector: Inspector, golden: Golden) -> dict[str, Tensors]:
    """What a station may feed: a threshold, a whole codebook with another number of parts, a centroid on a frame's own embedding."""
    rng = np.random.default_rng(7)
    moved = {name: tensor.copy() for name, tensor in golden.codebook.items()}
    spread = np.float32(moved["centroids"].std())
    for name in ("centroids", "cluster_mean"):
        moved[name] += rng.normal(0, 0.2 * spread, moved[name].shape).astype(np.float32)
    moved["cluster_radius"] *= np.float32(1.3)
    moved["novelty_scale"] *= np.float32(0.7)
    moved["calibration"] = np.sort(rng.uniform(0.1, 3, 17)).astype(np.float32)
    moved["calibration_weight"] = rng.uniform(0.5, 1, 17).astype(np.float32)
    threshold = {"novelty_threshold": np.array([np.median(golden.novelty_score) * 0.9 + 1e-3], np.float32)}
    sets: dict[str, Tensors] = {"threshold": threshold, "codebook": moved}
    if inspector.metadata.precision == "fp32":  # int8 kernels of another runtime embed the frame elsewhere
        sets["on_centroid"] = _placed(inspector, golden)
    return sets


def _placed(inspector: Inspector, golden: Golden) -> Tensors:
    embedding = inspector.run(golden.images[0][None], ("embedding",), overrides={})["embedding"][0]
    placed = {name: tensor.copy() for name, tensor in golden.codebook.items()}
    unit = embedding / max(float(np.linalg.norm(embedding)), 1e-12)
    placed["centroids"][0], placed["cluster_mean"][0] = unit if inspector.metadata.l2 else embedding, embedding
    return placed


def _golden_parts(folder: Path, name: str, golden: Golden, sets: tuple[str, ...]) -> list[Part]:
    """Every golden image as it is and with every override set; images may differ in size, so each is a part of its own."""
    parts, offset, file = [], 0, f"frames/golden-{name}.bin"
    with (folder / file).open("wb") as out:
        for n, image in enumerate(golden.images):
            out.write(np.ascontiguousarray(image).tobytes())
            for overrides in (None, *sets) if n < 2 or golden.kinds[n] != "part" else (None, sets[0], sets[1]):
                part = Part("golden", file, offset, 1, 1, image.shape[0], image.shape[1], overrides)
                parts.append(part if overrides is None else dataclasses.replace(part, name="override"))
            offset += image.nbytes
    return sorted(parts, key=lambda part: part.name == "override")  # the golden set first and in order


def _further_parts(folder: Path, fixed: tuple[int, int] | None, count: int) -> list[Part]:
    parts = []
    for (height, width), frames in further_frames(count, (fixed,) if fixed else SIZES):
        file = f"frames/{height}x{width}-{'fixed' if fixed else 'any'}-{count}.bin"
        n = _write_frames(folder / file, frames)
        parts.append(Part("further", file, 0, n, 1, height, width))
        parts.append(Part("batch", file, 0, min(n, 3 * BATCH - 1), BATCH, height, width))  # the last one is not full
    return parts


def _write_frames(path: Path, frames: Iterable[NDArray[np.uint8]]) -> int:
    written = 0
    with path.open("wb") as out:
        for frame in frames:
            out.write(np.ascontiguousarray(frame).tobytes())
            written += 1
    return written


def _expect(folder: Path, case: Case, inspector: Inspector, golden: Golden) -> None:
    """The answers of this onnxruntime; for the golden set those that travel with the model."""
    row = dataclasses.asdict(case)
    answers, names = AnswerFile(row), tuple(outputs_of(case.map_cells))
    for part in row["parts"]:
        feed = read_tensors(folder, row["overrides"][part["overrides"]]) if part["overrides"] else {}
        for frames in batches(folder, part):
            answers.add(inspector.run(frames, names, overrides=feed))
    answers.write(folder / "expected" / case.name)
    for name in ("distances", "novelty_score"):
        path = folder / "expected" / case.name / f"{name}.bin"
        values = np.fromfile(path, "<f4")
        kept = np.ravel(getattr(golden, name)).astype("<f4")
        values[: kept.size] = kept
        values.tofile(path)


def _nudged(folder: Path, case: Case) -> Case:
    """The same model with one weight changed by a twentieth of the largest one of its tensor."""
    proto = onnx.load(folder / case.model)
    used = {
        node.input[1] for node in proto.graph.node if node.op_type in {"Conv", "Gemm", "MatMul", "DequantizeLinear"}
    }
    weight = [t for t in proto.graph.initializer if t.name in used or len(t.dims) == 4][-1]
    values = numpy_helper.to_array(weight).copy()
    values.flat[0] += np.asarray(np.abs(values).max() / 20).astype(values.dtype)
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    onnx.save(proto, folder / "models" / "control-nudged.onnx")
    return _control(folder, case, "control-nudged", "one weight nudged", model="models/control-nudged.onnx")


def _exchanged(folder: Path, case: Case) -> Case:
    """The same model on frames whose red and blue are exchanged."""
    control = _control(folder, case, "control-rgb", "red and blue exchanged")
    parts = []
    for n, part in enumerate(control.parts):
        file = f"frames/control-rgb-{n}.bin"
        frames = np.concatenate(list(batches(folder, dataclasses.asdict(part))))
        np.ascontiguousarray(frames[..., ::-1]).tofile(folder / file)
        parts.append(dataclasses.replace(part, frames=file, offset=0))
    return dataclasses.replace(control, parts=parts)


def _control(folder: Path, case: Case, name: str, what: str, model: str | None = None) -> Case:
    """A case that expects the answers of `case` for its golden images and its first further frames."""
    keep = [n for n, part in enumerate(case.parts) if part.name in {"golden", "further"}]
    starts = np.cumsum([0, *(part.count for part in case.parts)])
    parts = [dataclasses.replace(case.parts[n], count=min(case.parts[n].count, CONTROL_FRAMES)) for n in keep]
    rows = np.concatenate([np.arange(starts[n], starts[n] + p.count) for n, p in zip(keep, parts, strict=True)])
    target = folder / "expected" / name
    target.mkdir(exist_ok=True)
    for output, dtype in outputs_of(case.map_cells).items():
        values = np.fromfile(folder / "expected" / case.name / f"{output}.bin", dtype).reshape(case.frames, -1)
        values[rows].tofile(target / f"{output}.bin")
    return dataclasses.replace(case, name=name, control=what, model=model or case.model, parts=parts)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="tests.runtimes.prepare", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="made anew")
    parser.add_argument("models", type=Path, nargs="*", metavar="MODEL.onnx")
    parser.add_argument("--further", type=int, default=FURTHER, metavar="N", help="further frames per model")
    parser.add_argument(
        "--own",
        nargs="*",
        default=None,
        metavar="NAME",
        help="of its own models; default: all, or with models given the one for the controls",
    )
    arguments = parser.parse_args(argv)
    shutil.rmtree(arguments.folder, ignore_errors=True)
    arguments.folder.mkdir(parents=True)
    # The controls need a model that every runtime answers alike; with models of others, that one is added.
    names = (
        arguments.own if arguments.own is not None else (CONTROLLED,) if arguments.models else (*RECIPES, *SQUEEZENETS)
    )
    models = [*arguments.models, *export_models(arguments.folder / "made", tuple(names))]
    cases = prepare(arguments.folder, models, arguments.further)
    print(f"{len(cases)} cases in {arguments.folder}: {', '.join(case.name for case in cases)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
