"""Runs one exported model on frames: `Inspector.inspect(frame)` gives cluster, verdict and novelty. The part to embed elsewhere.

Imports neither `devices` nor `configs`: a host program may have folders of those names. Thread-safe.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edge_dkm.codebook import Codebook, read_codebook
from edge_dkm.contract import (
    IMAGE,
    INPUT,
    OUTPUTS,
    OVERRIDABLE,
    THRESHOLD,
    Cluster,
    Metadata,
    Verdict,
    check_tensors,
    parse_metadata,
)
from edge_dkm.decision import Decision, Policy, Reason
from edge_dkm.errors import ContractError, FrameError, InspectionError, ModelError, UsageError
from edge_dkm.model_file import ModelFile, read_model

log = logging.getLogger(__name__)

Frame = NDArray[np.uint8]
Outputs = dict[str, NDArray[np.generic]]
_PLACE = re.compile(
    r"/onnxruntime_src/\S+ .*?\) (?=[A-Z])"
)  # where in its source; hides the reason in the first 300 characters
FETCHED = ("cluster_id", "distance", "novelty_score", "p_value", "is_novel", "distances")


@dataclass(frozen=True)
class Runtime:
    """How onnxruntime runs the graph. `threads` 0: one per core. `spinning` burns a core to shave microseconds off a busy line."""

    providers: Sequence[str] = ("CPUExecutionProvider",)
    options: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    threads: int = 0
    spinning: bool = False
    strict: bool = True


@dataclass(frozen=True)
class Inspection:
    """The answer for one frame.

    `distance` is to the nearest centroid; `margin` is how much further the second nearest lies (None where K is 1).
    `novelty_score`: dimensionless, higher is stranger, 1.0 is the edge at the target false-reject rate; `p_value` is the share of
    good parts that would look at least as strange.
    """

    cluster: Cluster
    distance: float
    margin: float | None
    novelty_score: float
    novelty_threshold: float
    p_value: float
    is_novel: bool
    verdict: Verdict
    reason: Reason


class Inspector:
    """One model, loaded and checked.

    Args:
        model: path of a file written by dkm-export, or its bytes.
        codebook: a station codebook that replaces the graph's own centroids, radii and calibration as a whole.
        runtime: execution providers and threads.
        policy: what the line makes of clusters; without one, the verdicts written into the graph.
        novelty_threshold: moves the edge (default: the graph's, 1.0); higher lets more through.

    Raises:
        ModelError: not a model, damaged, or a provider that did not load (with `runtime.strict`).
        ContractError: a model of another contract.
    """

    def __init__(
        self,
        model: str | Path | bytes,
        codebook: str | Path | None = None,
        *,
        runtime: Runtime | None = None,
        policy: Policy | None = None,
        novelty_threshold: float | None = None,
    ) -> None:
        self.file: ModelFile = read_model(model)
        self.runtime = runtime or Runtime()
        self._session: ort.InferenceSession | None = _open_session(self.file, self.runtime)
        self.metadata: Metadata = parse_metadata(self._session.get_modelmeta().custom_metadata_map, self.file.name)
        _check_contract(self._session, self.metadata, self.file.name)
        self.codebook: Codebook | None = None
        if codebook is not None:
            self.codebook = read_codebook(
                codebook,
                model_sha256=self.file.sha256,
                n_clusters=self.metadata.n_clusters,
                embed_dim=self.metadata.embed_dim,
            )
        self._feed: dict[str, NDArray[np.float32]] = dict(self.codebook.tensors) if self.codebook else {}
        self.default_threshold = _default_threshold(self.metadata)
        self.novelty_threshold = self.default_threshold
        if novelty_threshold is not None:
            self.set_novelty_threshold(novelty_threshold)
        self.policy = policy or Policy()
        clusters = self.metadata.clusters
        # One pair, replaced as one: no frame gets the name of one table and the verdict of another.
        self._table = clusters, Decision(clusters, self.policy, self.file.name)
        self._runs: set[ort.RunOptions] = set()

    @property
    def providers(self) -> list[str]:
        """What onnxruntime really runs the graph on, in order."""
        return list(self._open().get_providers())

    def set_novelty_threshold(self, threshold: float) -> None:
        """Moves the edge from the next frame on; must be a finite number greater than 0."""
        if not 0 < threshold < float("inf"):
            raise UsageError(f"novelty_threshold is {threshold}, expected a finite number greater than 0")
        self.novelty_threshold = float(threshold)
        self._feed = {**self._feed, THRESHOLD.name: np.array([threshold], np.float32)}

    def inspect(self, frame: Frame) -> Inspection:
        """Inspects one frame.

        Args:
            frame: (H, W, 3) uint8 BGR, the pixels of the ROI. Never written to; need not be contiguous.

        Raises:
            FrameError: wrong type, shape or size.
            InspectionError: the graph failed or gave a value that is not finite.
        """
        return self.inspect_batch([frame])[0]

    def inspect_batch(self, frames: Sequence[Frame]) -> list[Inspection]:
        """Inspects several frames of one size in one run; same results as one by one within float tolerance."""
        if not frames:
            return []
        checked = [self._checked(frame) for frame in frames]
        if len({frame.shape for frame in checked}) > 1:
            raise FrameError(
                "F-SHAPE", f"one batch holds frames of {sorted({f.shape for f in checked})}, expected one size"
            )
        outputs = self.run(checked[0][None] if len(checked) == 1 else np.stack(checked), FETCHED)
        return [self._inspection(outputs, n) for n in range(len(frames))]

    def run(
        self, image: Frame, names: Sequence[str], overrides: Mapping[str, NDArray[np.float32]] | None = None
    ) -> Outputs:
        """The graph's own outputs for `image` (N, H, W, 3) uint8. `overrides` replace this inspector's codebook and threshold."""
        session = self._open()
        feed = {IMAGE: image, **(self._feed if overrides is None else overrides)}
        options = ort.RunOptions()
        self._runs.add(options)
        try:
            values = session.run(list(names), feed, options)
        except Exception as error:  # onnxruntime raises many types; none of them may end the line
            raise InspectionError(
                "R-RUNTIME", f"{self.file.name} failed on a frame of {image.shape}: {_first_line(error)}"
            ) from error
        finally:
            self._runs.discard(options)
        return dict(zip(names, values, strict=True))

    def interrupt(self) -> None:
        """Asks the runs that are under way, in other threads, to end between two nodes of the graph; they raise InspectionError."""
        for options in list(self._runs):
            options.terminate = True

    def relabel(self, clusters: tuple[Cluster, ...], policy: Policy) -> None:
        """Other names and verdicts from the next frame on; `clusters` has the ids of the graph's own table."""
        self._table, self.policy = (clusters, Decision(clusters, policy, self.file.name)), policy

    def twin(self) -> Inspector:
        """The same loaded model with a threshold and labels of its own, for another camera; it has to be closed too."""
        return copy.copy(self)

    @property
    def clusters(self) -> tuple[Cluster, ...]:
        """The cluster table as it is used now."""
        return self._table[0]

    def close(self) -> None:
        """Frees the session; runs that are under way finish."""
        self._session = None

    def __enter__(self) -> Inspector:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self) -> ort.InferenceSession:
        session = self._session
        if session is None:
            raise UsageError(f"this Inspector of {self.file.name} is closed")
        return session

    def _checked(self, frame: Frame) -> Frame:
        if not isinstance(frame, np.ndarray):
            raise FrameError(
                "F-TYPE",
                f"the frame is {type(frame).__name__}, expected a numpy array (did the camera or cv2.imread return None?)",
            )
        if frame.dtype != np.uint8:
            raise FrameError("F-DTYPE", f"the frame is {frame.dtype}, expected uint8 (0 to 255)")
        if frame.ndim != 3 or frame.shape[2] != 3:
            hint = "; cv2.cvtColor(frame, cv2.COLOR_GRAY2BGR) makes one" if frame.ndim == 2 else ""
            raise FrameError("F-SHAPE", f"the frame has the shape {frame.shape}, expected (H, W, 3) BGR{hint}")
        spec = self.metadata.input
        if 0 in frame.shape or (spec.h is not None and spec.w is not None and frame.shape[:2] != (spec.h, spec.w)):
            expected = f"{spec.w}x{spec.h}" if spec.h is not None else "at least 1x1"
            raise FrameError(
                "F-SHAPE",
                f"the frame is {frame.shape[1]}x{frame.shape[0]}, {self.file.name} expects {expected} (the pixels of the ROI)",
            )
        return np.ascontiguousarray(frame)

    def _inspection(self, outputs: Outputs, n: int) -> Inspection:
        distances = outputs["distances"][n]
        score, distance, p_value = (float(outputs[name][n]) for name in ("novelty_score", "distance", "p_value"))
        if not (np.isfinite(score) and np.isfinite(p_value) and np.isfinite(distances).all()):
            raise InspectionError(
                "R-NONFINITE", f"{self.file.name} gave novelty_score {score}, distance {distance}: not a usable answer"
            )
        cluster_id, is_novel = int(outputs["cluster_id"][n]), bool(outputs["is_novel"][n])
        clusters, decide = self._table
        verdict, reason = decide(cluster_id, is_novel)
        margin = float(np.partition(distances, 1)[1] - distances.min()) if distances.shape[0] > 1 else None
        return Inspection(
            clusters[cluster_id],
            distance,
            margin,
            score,
            self.novelty_threshold,
            p_value,
            is_novel,
            verdict,
            reason,
        )


def _open_session(file: ModelFile, runtime: Runtime) -> ort.InferenceSession:
    available = ort.get_available_providers()
    missing = [provider for provider in runtime.providers if provider not in available]
    if missing and runtime.strict:
        raise ModelError(
            f"this onnxruntime has no {missing[0]}, it has {', '.join(available)}; install the build for it, or choose another device"
        )
    wanted = [provider for provider in runtime.providers if provider in available] or ["CPUExecutionProvider"]
    options = ort.SessionOptions()
    options.log_severity_level = 3  # a warning per overridable initialiser would bury everything else
    options.intra_op_num_threads = runtime.threads
    options.inter_op_num_threads = 1
    # The digest covers this file alone: weights beside it, or in the working directory, are never read.
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", "/nonexistent")
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if runtime.spinning else "0")
    try:
        session = ort.InferenceSession(
            file.data, options, providers=[(p, dict(runtime.options.get(p, {}))) for p in wanted]
        )
    except Exception as error:  # onnxruntime raises many types for a file that is no model
        if "xternal data" in str(error):
            raise ModelError(
                f"{file.name} keeps its weights in other files (external data), expected one file; write it again with dkm-export"
            ) from error
        raise ModelError(
            f"{file.name} ({len(file.data)} bytes) cannot be loaded as an ONNX model: {_first_line(error)}"
        ) from error
    silent = [provider for provider in wanted if provider not in session.get_providers()]
    if silent and runtime.strict:
        raise ModelError(
            f"onnxruntime fell back from {silent[0]} to {', '.join(session.get_providers())} for {file.name}; "
            f"its driver or library is missing (strict_provider: false accepts the fallback)"
        )
    return session


def _check_contract(session: ort.InferenceSession, metadata: Metadata, name: str) -> None:
    def described(nodes: Sequence[ort.NodeArg]) -> dict[str, tuple[str, list[object]]]:
        return {node.name: (node.type, list(node.shape)) for node in nodes}

    sizes = {"K": metadata.n_clusters, "D": metadata.embed_dim}
    check_tensors(name, "input", described(session.get_inputs()), (INPUT,), {})
    check_tensors(name, "output", described(session.get_outputs()), OUTPUTS, sizes)
    check_tensors(name, "overridable input", described(session.get_overridable_initializers()), OVERRIDABLE, sizes)
    extra = [node.name for node in session.get_inputs() if node.name != IMAGE]
    if extra:
        raise ContractError(f"{name} demands the further inputs {', '.join(extra)}, expected '{IMAGE}' alone")


def _default_threshold(metadata: Metadata) -> float:
    threshold = metadata.novelty.get("threshold")
    return float(threshold) if isinstance(threshold, int | float) else 1.0


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return _PLACE.sub("", text.splitlines()[0])[:300]
