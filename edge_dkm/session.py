"""Opens onnxruntime sessions and finds out what really runs: providers, precision, kernels, whether inputs can be overridden.

`Inspector` opens its model here. What cannot be known beforehand is tried on a frame: a provider may take a model and run nothing of it,
and one may take the value of an overridable input and ignore it (measured: OpenVINO folds it as a constant, without a word).
"""

from __future__ import annotations

import json
import logging
import re
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edge_dkm.compiled import is_filled, made, renewed
from edge_dkm.contract import IMAGE, InputSpec, Metadata
from edge_dkm.errors import ModelError
from edge_dkm.head import compute_head, to_cluster_space
from edge_dkm.model_file import ModelFile
from edge_dkm.runtime import COMPILING, CPU, Lowering, Runtime, check_precision, provider_options

log = logging.getLogger(__name__)

SPARE_FRAME = (224, 224)  # (width, height) to try with, where the training had frames of several sizes
_PLACE = re.compile(
    r"/onnxruntime\S* .*?\) (?=[A-Z])"
)  # where in its source; hides the reason in the first 300 characters


@dataclass(frozen=True)
class Ran:
    """What really runs. `kernels`: how many ran on each provider for one frame (a fused part counts as one), None where that is plain.

    `asked` is the precision of the profile, and `why` it is not used. `head`: who works out cluster and novelty when a codebook or
    threshold is replaced, the graph or the runtime. `compile_s`: from opening to the end of the first run; `from_cache`: with something
    compiled earlier in `cache`.
    """

    actual: tuple[str, ...]
    precision: Lowering
    asked: Lowering
    head: Literal["graph", "runtime"]
    compile_s: float
    kernels: Mapping[str, int] | None = None
    cache: Path | None = None
    from_cache: bool = False
    why: str | None = None


@dataclass(frozen=True)
class Opened:
    """A session that has run at least once, unless it runs on the CPU provider alone."""

    session: ort.InferenceSession
    ran: Ran


@dataclass(frozen=True)
class _Compiled:
    """`cache`: the folder that it was opened with; `from_cache`: something lay in it."""

    session: ort.InferenceSession
    cache: Path | None = None
    from_cache: bool = False


@dataclass(frozen=True)
class First:
    """The session that the contract is read from, and how long it took to open."""

    session: ort.InferenceSession
    seconds: float


def open_first(file: ModelFile, runtime: Runtime) -> First:
    """The session to run, where that is on the CPU provider alone; else one to look at before minutes are spent on compiling.

    Raises:
        ModelError, UsageError: as `open_session`.
    """
    started_s = time.perf_counter()
    if runs_on_cpu_alone(runtime):
        session = open_session(file, runtime)
    else:
        options = _session_options(Runtime(threads=1))
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = _create(file, options, [(CPU, {})])
    return First(session, time.perf_counter() - started_s)


def open_session(file: ModelFile, runtime: Runtime) -> ort.InferenceSession:
    """A session on the runtime's providers.

    Raises:
        ModelError: no model, or a provider that is missing or fell back (with `runtime.strict`).
        UsageError: a precision that the provider does not have.
    """
    return _open(file, runtime, _session_options(runtime), made(cache_folder(file, runtime))).session


def open_profiled(file: ModelFile, runtime: Runtime, prefix: Path, *, plain: bool = False) -> ort.InferenceSession:
    """A session that writes a profile to `prefix`. `plain`: on the CPU, nothing fused or packed: every node keeps its name and shapes."""
    options = _session_options(runtime)
    options.enable_profiling, options.profile_file_prefix = True, str(prefix)
    if plain:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.disable_prepacking", "1")
        return _create(file, options, [(CPU, {})])
    return _open(file, runtime, options, made(cache_folder(file, runtime))).session


def open_tried(file: ModelFile, metadata: Metadata, runtime: Runtime, first: First) -> Opened:
    """A session that was tried on a frame of noise and warmed up; `first` itself where that is one on the CPU provider alone.

    Raises:
        ModelError: as `open_session`; the model does not suit the profile; with `runtime.strict`, a provider that runs nothing of it.
    """
    _check_suits(file, metadata, runtime)
    head: Literal["graph", "runtime"]
    if runs_on_cpu_alone(runtime):  # known to override, and nothing is compiled
        why = None if runtime.precision == "fp32" else f"{runtime.providers[0]} is not here"
        warm_up(first.session, file, metadata.input, runtime.warm_up)
        head = "runtime" if runtime.io_binding else "graph"
        ran = Ran(tuple(first.session.get_providers()), "fp32", runtime.precision, head, first.seconds, why=why)
        return Opened(first.session, ran)
    started_s = time.perf_counter()
    image = noise(metadata.input)
    with tempfile.TemporaryDirectory(prefix="edge-dkm-") as folder:
        options = _session_options(runtime)
        options.enable_profiling, options.profile_file_prefix = True, str(Path(folder) / "run")
        compiled = _open(file, runtime, options, made(cache_folder(file, runtime)))
        session = compiled.session
        _try(session, file, image)
        compile_s = time.perf_counter() - started_s
        kernels = _kernels(session)
    actual = tuple(p for p in session.get_providers() if kernels is None or kernels.get(p))
    wanted = runtime.providers[0]
    if wanted not in actual:
        text = f"{wanted} takes {file.name} but runs nothing of it: all of it ran on {', '.join(actual)}"
        if runtime.strict:
            raise ModelError(f"{text} (strict_provider: false accepts that)")
        log.warning("%s", text)
    # Bound inputs know nothing of overridable ones ("Failed to find NodeArg", onnxruntime 1.31).
    heeds = not runtime.io_binding and can_override(session, metadata, image)
    warm_up(session, file, metadata.input, runtime.warm_up - 1)
    precision: Lowering = runtime.precision if wanted in actual else "fp32"
    head = "graph" if heeds else "runtime"
    ran = Ran(actual, precision, runtime.precision, head, compile_s, kernels, compiled.cache, compiled.from_cache)
    return Opened(session, ran)


def runs_on_cpu_alone(runtime: Runtime) -> bool:
    """Whether no other provider is asked for, or none of them is here."""
    return not [p for p in runtime.providers if p != CPU and p in ort.get_available_providers()]


def noise(spec: InputSpec) -> NDArray[np.uint8]:
    """(1, H, W, 3): what to try and warm up with, of the size that the model was trained on."""
    width, height = spec.trained_size or SPARE_FRAME
    return np.random.default_rng(0).integers(0, 256, (1, height, width, 3), dtype=np.uint8)


def warm_up(session: ort.InferenceSession, file: ModelFile, spec: InputSpec, runs: int) -> None:
    """Runs noise of the trained size, so that the first part is not the slow one; ModelError where that fails."""
    if runs <= 0:
        return
    image = noise(spec)
    for _ in range(runs):
        _try(session, file, image)


def can_override(session: ort.InferenceSession, metadata: Metadata, image: NDArray[np.uint8]) -> bool:
    """Whether the session heeds a replaced codebook and threshold: found out with one that puts its last centroid onto the frame."""
    try:
        taken = [np.asarray(value, np.float32) for value in session.run(list(metadata.head_inputs), {IMAGE: image})]
        embedding, *joined = taken
        placed = to_cluster_space(embedding, metadata.l2)[0]
        centroids = np.repeat(placed[None] + np.float32(1), metadata.n_clusters, 0)
        centroids[-1] = placed
        codebook = {
            "centroids": centroids,
            "cluster_mean": np.repeat(embedding - np.float32(1), metadata.n_clusters, 0),
            "cluster_radius": np.ones(metadata.n_clusters, np.float32),
            "novelty_scale": np.array([2], np.float32),
            "calibration": np.zeros(1, np.float32),
            "calibration_weight": np.ones(1, np.float32),
        }
        names = ["cluster_id", "distances", "novelty_score", "p_value", "is_novel"]
        for threshold in (1e-30, 1e30):
            expected = compute_head(embedding, codebook, threshold, metadata.l2, *joined)
            feed = {IMAGE: image, "novelty_threshold": np.array([threshold], np.float32), **codebook}
            for name, value in zip(names, session.run(names, feed), strict=True):
                if not np.allclose(np.asarray(value, np.float64), np.asarray(expected[name], np.float64), 0.1, 0.1):
                    return False
    except Exception as error:  # noqa: BLE001 (onnxruntime raises many types; whatever it is, it cannot)
        log.debug("overriding inputs failed: %s", error)
        return False
    return True


def cache_folder(file: ModelFile, runtime: Runtime) -> Path | None:
    """Where the compiled model is kept: by model, provider, version of onnxruntime and precision. None: nothing to keep."""
    first = next((p for p in runtime.providers if p in COMPILING), None)
    if runtime.cache is None or first is None:
        return None
    kind = first.removesuffix("ExecutionProvider").lower()
    return runtime.cache / f"{file.sha256[:12]}-{kind}-{ort.__version__}-{runtime.precision}"


def _check_suits(file: ModelFile, metadata: Metadata, runtime: Runtime) -> None:
    """Before anything is compiled."""
    device = runtime.device or runtime.providers[0]
    if runtime.fixed_frame and metadata.input.h is None:
        raise ModelError(
            f"{file.name} takes frames of any size, but {device} compiles for one; export it with --frame HxW (the ROI's size)"
        )
    steps = json.loads(metadata.raw.get("dkm.preprocess", "[]"))
    mode = next((step.get("mode") for step in steps if step.get("op") == "resize"), None)
    if runtime.resize and mode is not None and mode not in runtime.resize:
        raise ModelError(
            f"{file.name} has preprocess.resize {mode}, {device} runs {', '.join(runtime.resize)}; train and export with one of them"
        )


def _session_options(runtime: Runtime) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.log_severity_level = 3  # a warning per overridable initialiser would bury everything else
    options.intra_op_num_threads = runtime.threads
    options.inter_op_num_threads = 1
    # The digest covers this file alone: weights beside it, or in the working directory, are never read.
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", "/nonexistent")
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if runtime.spinning else "0")
    return options


def _open(file: ModelFile, runtime: Runtime, options: ort.SessionOptions, cache: Path | None) -> _Compiled:
    available = ort.get_available_providers()
    missing = [provider for provider in runtime.providers if provider not in available]
    if missing and runtime.strict:
        raise ModelError(
            f"this onnxruntime has no {missing[0]}, it has {', '.join(available)}; install the build for it, or choose another device"
        )
    check_precision(runtime)
    wanted = [provider for provider in runtime.providers if provider in available] or [CPU]
    try:
        compiled = _compile(file, runtime, wanted, options, cache)
    except ModelError as error:
        if runtime.strict or wanted == [CPU]:
            raise
        log.warning("%s; it runs on %s instead", error, CPU)
        return _Compiled(_create(file, options, [(CPU, {})]))
    actual = compiled.session.get_providers()
    silent = [provider for provider in wanted if provider not in actual]
    if silent and runtime.strict:
        raise ModelError(
            f"onnxruntime fell back from {silent[0]} to {', '.join(actual)} for {file.name}; its driver or a library "
            f"is missing, or it does not know one of the profile's options (strict_provider: false accepts the fallback)"
        )
    return compiled


def _compile(
    file: ModelFile, runtime: Runtime, wanted: Sequence[str], options: ort.SessionOptions, cache: Path | None
) -> _Compiled:
    """With what lies in the cache, else without it, once."""

    def created(folder: Path | None) -> ort.InferenceSession:
        return _create(file, options, [(p, provider_options(p, runtime, folder)) for p in wanted])

    is_old = is_filled(cache)
    try:
        return _Compiled(created(cache), cache, is_old)
    except ModelError:
        if cache is None or not is_old:
            raise
        log.warning("%s does not load with what lies in %s; it is compiled anew", file.name, cache)
        with renewed(cache) as fresh:
            return _Compiled(created(fresh), fresh)


def _create(
    file: ModelFile, options: ort.SessionOptions, providers: Sequence[tuple[str, dict[str, str]]]
) -> ort.InferenceSession:
    try:
        # Its own fallback prints to stdout and goes on on the CPU, also in the middle of a run (1.17 does not know the argument).
        session = ort.InferenceSession(file.data, options, providers=list(providers), enable_fallback=0)
        session.disable_fallback()
        return session
    except Exception as error:  # onnxruntime raises many types for a file that is no model
        if "xternal data" in str(error):
            raise ModelError(
                f"{file.name} keeps its weights in other files (external data), expected one file; write it again with dkm-export"
            ) from error
        on = "" if providers[0][0] == CPU else f" on {providers[0][0]}"
        raise ModelError(
            f"{file.name} ({len(file.data)} bytes) cannot be loaded as an ONNX model{on}: {first_line(error)}"
        ) from error


def _try(session: ort.InferenceSession, file: ModelFile, image: NDArray[np.uint8]) -> None:
    try:
        session.run(None, {IMAGE: image})
    except Exception as error:  # onnxruntime raises many types
        raise ModelError(
            f"{file.name} fails on {session.get_providers()[0]} with a frame of noise {image.shape[1:3]}: {first_line(error)}"
        ) from error


def _kernels(session: ort.InferenceSession) -> dict[str, int] | None:
    """Ends the profiling of a session; how many kernels ran on each provider."""
    try:
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        names = Counter(event["args"]["provider"] for event in events if event.get("args", {}).get("provider"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.debug("no profile of the first run: %s", error)
        return None
    return dict(names) or None


def run_bound(
    session: ort.InferenceSession,
    feed: Mapping[str, NDArray[np.generic]],
    names: Sequence[str],
    options: ort.RunOptions,
) -> list[NDArray[np.generic]]:
    """For GPUs: inputs are bound where they lie, outputs come back in one step. On a GPU it was never run by this project."""
    binding = session.io_binding()
    for name, value in feed.items():
        binding.bind_cpu_input(name, np.ascontiguousarray(value))
    for name in names:
        binding.bind_output(name)  # to the processor's memory: a few numbers per frame
    binding.synchronize_inputs()
    session.run_with_iobinding(binding, options)
    binding.synchronize_outputs()
    return list(binding.copy_outputs_to_cpu())


def first_line(error: BaseException) -> str:
    """The reason without the place in onnxruntime's source."""
    text = str(error).strip() or type(error).__name__
    return _PLACE.sub("", text.splitlines()[0])[:300]
