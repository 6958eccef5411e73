"""Run folder -> verified `.onnx` with its golden images and digest beside it. `dkm-export` calls it; nothing is written until all checks passed."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort

from devices.profile import DeviceProfile
from edge_dkm import __version__
from edge_dkm.contract import CONTRACT, METADATA
from edge_dkm.errors import EdgeError
from edge_dkm.golden import save_golden, verify_golden
from edge_dkm.inspector import Inspector
from edge_dkm.model_file import digest_path, golden_path
from exporters.errors import ExportError
from exporters.gate import Promise
from exporters.graph import FusedModel
from exporters.int8 import Fp32, Int8, try_int8
from exporters.reference import drift_reference, reference_sentence
from exporters.trace import trace
from exporters.verify import Parity, check_parity, make_golden
from trainer import golden
from trainer.artifact import Run
from trainer.codebook import set_calibration
from trainer.novelty import NoveltySettings
from trainer.preprocess import AliasError


@dataclass(frozen=True)
class ExportOptions:
    """`frame` (height, width) fixes the input size; `profile` is checked for what it can run; `int8` quantises the encoder."""

    frame: tuple[int, int] | None = None
    profile: DeviceProfile | None = None
    int8: bool = False


@dataclass(frozen=True)
class Exported:
    """What was written and what was proven. `int8`: what came of quantising, None where it was not asked for; `drift`: its reference."""

    path: Path
    sha256: str
    parity: Parity
    golden_images: int
    novelty: dict[str, Any]
    clusters: list[dict[str, Any]]
    rejected: list[str]
    int8: Int8 | None = None
    drift: str = ""


def export_run(run: Run, path: Path, options: ExportOptions | None = None) -> Exported:
    """Fuses, traces, verifies and writes `path`, `<path>.golden.npz` and `<path>.sha256`.

    Raises:
        ExportError: the graph does not do what the model does, or does not fit the profile; nothing is written.
    """
    options = options or ExportOptions()
    if run.info["train"].get("refusal"):
        raise ExportError(f"{run.path or 'this run'} must not be exported: {run.info['train']['refusal']}")
    frame = _frame(run, options)
    clusters = run.clusters
    rejected = frozenset(row["id"] for row in clusters if row.get("verdict") == "reject")
    novelty = _calibrate(run, rejected)
    fused = FusedModel(run.model.cpu().eval())
    proto = trace(fused, frame)
    props = _metadata(run, path.stem, clusters, novelty, frame)
    candidates = golden.load_images(run.path / "golden") if run.path else []
    int8: Int8 | None = None
    try:
        draft = Inspector(_with_metadata(proto, props))
        answers = make_golden(draft, fused, candidates)
        parity = check_parity(draft, fused, answers.images)
        proof = {"max_abs": parity.max_score_difference, "id_agreement": 1.0, "ort": ort.__version__}
        if options.int8:
            as_int8 = {**props, "dkm.precision": "int8"}
            fp32 = Fp32(proto, fused, draft, frame, candidates, lambda m: Inspector(_with_metadata(m, as_int8)))
            int8 = try_int8(run, fp32, _promise(run, novelty, rejected))
            props["dkm.quantization"] = json.dumps(int8.plain(), allow_nan=False)
            if int8.accepted is not None and int8.report is not None:
                proto, answers, props["dkm.precision"] = int8.accepted.model, int8.accepted.golden, "int8"
                proof |= {"max_abs": int8.report.score_gap, "id_agreement": int8.report.agreement}
        reference = drift_reference(run, Inspector(_with_metadata(proto, props)), frame)
        props["dkm.reference_hist"] = json.dumps(reference, allow_nan=False)
        golden_bytes = save_golden(answers)
        props |= {"dkm.golden_sha256": hashlib.sha256(golden_bytes).hexdigest(), "dkm.parity": json.dumps(proof)}
        data = _with_metadata(proto, props)
        verify_golden(Inspector(data), answers)
    except EdgeError as error:
        raise ExportError(f"the exported graph fails its own checks, nothing was written: {error}") from error
    _write(path, data, golden_bytes)
    return Exported(
        path,
        hashlib.sha256(data).hexdigest(),
        parity,
        len(answers.images),
        novelty,
        clusters,
        [row["name"] for row in clusters if row["id"] in rejected],
        int8,
        reference_sentence(reference),
    )


def _frame(run: Run, options: ExportOptions) -> tuple[int, int] | None:
    preprocess, profile = run.settings.preprocess, options.profile
    size = (run.model.preprocess.height_px, run.model.preprocess.width_px)
    if profile is not None and preprocess.resize not in profile.resize:
        raise ExportError(
            f"device {profile.title} cannot run preprocess.resize: {preprocess.resize}, expected one of {', '.join(profile.resize)}; "
            f"train with one of them (another resize would give other answers)"
        )
    if preprocess.resize == "none":
        if options.frame is not None and options.frame != size:
            raise ExportError(
                f"--frame is {options.frame[0]}x{options.frame[1]}, but with preprocess.resize: none the frame is {size[0]}x{size[1]}"
            )
        return size
    if options.frame is not None:
        try:
            run.model.preprocess.check_step(*options.frame)
        except AliasError as error:
            raise ExportError(f"--frame: {error}") from None
        return options.frame
    if preprocess.resize == "matmul" or (profile is not None and profile.fixed_frame):
        common = run.info["input"]["roi"][2:] if run.info["input"]["roi"] else run.info["input"]["frame"]
        if not common:
            raise ExportError(
                "this device and resize mode need a fixed frame size and the training images have several; give --frame HxW (the ROI's size)"
            )
        return int(common[1]), int(common[0])
    return None


def _calibrate(run: Run, rejected: frozenset[int]) -> dict[str, Any]:
    """Novelty for the parts that are not rejected anyway; the run's own figures where nothing is."""
    settings = run.settings.calibration or NoveltySettings()
    calibration = set_calibration(run.model, run.parts, settings, rejected)
    promise = {"promised_frr": calibration.promised_frr} if run.parts.is_held_out else {}
    learned = dict(run.info["novelty"])
    if "bank" in learned:  # what else was tried stays in the run folder
        learned["bank"] = {key: value for key, value in learned["bank"].items() if key != "choice"}
    return {
        **learned,
        **promise,
        "n_calib": calibration.parts,
        "groups": calibration.groups,
        "scale": calibration.scale,
    }


def _promise(run: Run, novelty: dict[str, Any], rejected: frozenset[int]) -> Promise | None:
    if not run.parts.is_held_out:
        return None
    return Promise(novelty["promised_frr"], novelty["groups"], novelty.get("unit", "part"), rejected)


def _metadata(
    run: Run, model_id: str, clusters: list[dict[str, Any]], novelty: dict[str, Any], frame: tuple[int, int] | None
) -> dict[str, str]:
    info, preprocess = run.info, run.settings.preprocess
    height, width = frame or (None, None)
    values: dict[str, Any] = {
        "dkm.contract": CONTRACT,
        "dkm.model_id": model_id,
        "dkm.producer": f"edge-dkm {__version__}",
        "dkm.created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "dkm.method": info["method"],
        "dkm.encoder": info["encoder"],
        "dkm.embed_dim": run.model.projection.out_dim,
        "dkm.n_clusters": run.model.n_clusters,
        "dkm.metric": "euclidean",
        "dkm.input": {
            "layout": "NHWC",
            "dtype": "uint8",
            "color": "bgr",
            "h": height,
            "w": width,
            "fit": preprocess.fit,
            "roi": info["input"]["roi"],
            "frame": info["input"]["frame"],
        },
        "dkm.preprocess": [
            {
                "op": "resize",
                "mode": preprocess.resize,
                "fit": preprocess.fit,
                "antialias": preprocess.antialias,
                "h": run.model.preprocess.height_px,
                "w": run.model.preprocess.width_px,
            },
            *(
                []
                if preprocess.local_contrast is None
                else [{"op": "local_contrast", "share": preprocess.local_contrast}]
            ),
            {"op": "normalise", "color": preprocess.color, **info["preprocess"]},
        ],
        "dkm.projection": {
            "kind": run.settings.projection.kind,
            "sqrt": run.settings.projection.sqrt,
            "l2": run.settings.projection.l2,
        },
        "dkm.clusters": clusters,
        "dkm.novelty": novelty,
        "dkm.train": {key: info["train"][key] for key in ("n", "n_train", "manifest_sha256", "seed", "git")},
        "dkm.metrics": info["metrics"],
        "dkm.reference_hist": info["reference"],
        "dkm.parity": {},
        "dkm.precision": "fp32",
        "dkm.quantization": {},
        "dkm.golden_sha256": "",
        "dkm.license": "",
    }
    return {
        key: json.dumps(values[key], ensure_ascii=False, allow_nan=False) if is_json else str(values[key])
        for key, is_json in METADATA.items()
    }


def _with_metadata(proto: onnx.ModelProto, props: dict[str, str]) -> bytes:
    proto.producer_name, proto.producer_version = "edge-dkm", __version__
    onnx.helper.set_model_props(proto, props)
    return proto.SerializeToString(deterministic=True)


def _write(path: Path, data: bytes, golden_bytes: bytes) -> None:
    """The model last: a reader that sees it also sees what belongs to it."""
    digest = f"{hashlib.sha256(data).hexdigest()}  {path.name}\n".encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for target, content in ((golden_path(path), golden_bytes), (digest_path(path), digest), (path, data)):
            temporary = target.with_name(f".{target.name}.tmp")
            temporary.write_bytes(content)
            temporary.replace(target)
    except OSError as error:
        raise ExportError(f"{path} cannot be written: {error.strerror or error}") from None
