"""Runs one exported model on frames: `Inspector.inspect(frame)` gives cluster, verdict and novelty. The part to embed elsewhere.

Imports neither `devices` nor `configs`: a host program may have folders of those names. Thread-safe.
"""

from __future__ import annotations

import copy
import threading
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
    OVERRIDABLE,
    PATCH_OUTPUTS,
    THRESHOLD,
    Cluster,
    Metadata,
    Verdict,
    check_tensors,
    parse_metadata,
)
from edge_dkm.decision import Decision, Policy, Reason
from edge_dkm.errors import ContractError, FrameError, InspectionError, UsageError
from edge_dkm.head import Outputs, compute_head, is_whole
from edge_dkm.lowered import open_lowered
from edge_dkm.model_file import ModelFile, read_model
from edge_dkm.runtime import Runtime
from edge_dkm.session import Opened, Ran, first_line, open_first, open_tried, run_bound, runs_on_cpu_alone

__all__ = ["FETCHED", "Frame", "Inspection", "Inspector", "Outputs", "Runtime"]

Frame = NDArray[np.uint8]
Vector = NDArray[np.float32]
FETCHED = ("cluster_id", "distance", "novelty_score", "p_value", "is_novel", "distances", "embedding")
PATCH_SCORE, NOVELTY_MAP = (spec.name for spec in PATCH_OUTPUTS)


@dataclass(frozen=True)
class Inspection:
    """The answer for one frame.

    `distance` is to the nearest centroid; `margin` is how much further the second nearest lies (None where K is 1).
    `novelty_score`: dimensionless, higher is stranger, 1.0 is the edge at the target false-reject rate; `p_value` is the share of
    good parts that would look at least as strange. `embedding` (D,) is before any L2; `patch_score` is None without a patch bank.
    `codebook` judged: `base`, or the 12-digit digest of a station's own.
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
    embedding: Vector = field(compare=False, repr=False)
    patch_score: float | None = None
    codebook: str = "base"


@dataclass(frozen=True)
class _Edge:
    """`feed`: what replaces the graph's own values: the threshold, where one was set, and a station's codebook."""

    threshold: float
    feed: Mapping[str, Vector]
    codebook: Codebook | None = None


class Inspector:
    """One model, loaded and checked.

    Args:
        model: path of a file written by dkm-export, or its bytes.
        codebook: a station codebook that replaces the graph's own centroids, radii and calibration as a whole.
        runtime: execution providers, threads, precision, warm-up; `ran` says what became of it.
        policy: what the line makes of clusters; without one, the verdicts written into the graph.
        novelty_threshold: moves the edge (default: the graph's, 1.0); higher lets more through.

    Raises:
        ModelError: not a model, damaged, or a provider that did not load or runs nothing of it (with `runtime.strict`).
        ContractError: a model of another contract.
        UsageError: a precision that the provider does not have, a threshold or policy that makes no sense.
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
        self.metadata, opened = _open_model(self.file, self.runtime)
        self.ran: Ran = opened.ran
        self._session: ort.InferenceSession | None = opened.session
        self.default_threshold = _default_threshold(self.metadata)
        # One object, replaced as one: no frame is compared with one threshold or codebook and reported with another.
        self._edge, self._edge_lock = _Edge(self.default_threshold, {}), threading.Lock()
        if codebook is not None:
            self.set_codebook(self.read_codebook(codebook))
        if novelty_threshold is not None:
            self.set_novelty_threshold(novelty_threshold)
        self.policy = policy or Policy()
        clusters = self.metadata.clusters
        # One pair, replaced as one: no frame gets the name of one table and the verdict of another.
        self._table = clusters, Decision(clusters, self.policy, self.file.name)
        self._runs: set[ort.RunOptions] = set()

    @property
    def providers(self) -> list[str]:
        """What really runs the graph, in order; those that run nothing of it are left out where that is known."""
        self._open()
        return list(self.ran.actual)

    @property
    def fetched(self) -> tuple[str, ...]:
        """The outputs that an inspection takes from the graph."""
        return (*FETCHED, PATCH_SCORE) if self.metadata.has_patches else FETCHED

    @property
    def precision(self) -> str:
        """Of what really runs: the file's (fp32 or int8), unless the provider lowers it."""
        return self.metadata.precision if self.ran.precision == "fp32" else self.ran.precision

    @property
    def novelty_threshold(self) -> float:
        """The edge as it is used now."""
        return self._edge.threshold

    def set_novelty_threshold(self, threshold: float) -> None:
        """Moves the edge from the next frame on; must be a finite number greater than 0."""
        if not 0 < threshold < float("inf"):
            raise UsageError(f"novelty_threshold is {threshold}, expected a finite number greater than 0")
        with self._edge_lock:
            feed = {**self._edge.feed, THRESHOLD.name: np.array([threshold], np.float32)}
            self._edge = _Edge(float(threshold), feed, self._edge.codebook)

    @property
    def codebook(self) -> Codebook | None:
        """The station codebook that judges now; None: the graph's own."""
        return self._edge.codebook

    def read_codebook(self, path: str | Path) -> Codebook:
        """A station codebook of this model; raises ModelError or ContractError where it is none."""
        sizes = {"n_clusters": self.metadata.n_clusters, "embed_dim": self.metadata.embed_dim}
        return read_codebook(path, model_sha256=self.file.sha256, **sizes)

    def set_codebook(self, codebook: Codebook | None) -> None:
        """Judges by another codebook of this model (`read_codebook`) from the next frame on; None: by the graph's own."""
        if codebook is not None and codebook.model_sha256 != self.file.sha256:
            raise UsageError(f"codebook {codebook.sha12} is not of {self.file.name}; read it by read_codebook")
        with self._edge_lock:
            feed = {THRESHOLD.name: self._edge.feed[THRESHOLD.name]} if THRESHOLD.name in self._edge.feed else {}
            self._edge = _Edge(self._edge.threshold, feed | dict(codebook.tensors if codebook else {}), codebook)

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
        edge = self._edge
        outputs = self.run(checked[0][None] if len(checked) == 1 else np.stack(checked), self.fetched, edge.feed)
        return [self._inspection(outputs, n, edge) for n in range(len(frames))]

    def novelty_map(self, frame: Frame) -> Vector:
        """Where a frame is strange: (h, w), the bank's distances cell by cell, 1.0 = the edge of the codebook in use.

        Raises:
            UsageError: the model has no bank.
            FrameError, InspectionError: as `inspect`.
        """
        if not self.metadata.has_patches:
            raise UsageError(f"{self.file.name} has no novelty_map; train with novelty.bank")
        scale = self._edge.feed.get("novelty_scale", self.metadata.novelty.get("scale", 1.0))
        found = np.asarray(self.run(self._checked(frame)[None], (NOVELTY_MAP,))[NOVELTY_MAP][0], np.float32)
        return found / np.float32(np.ravel(np.asarray(scale, np.float64))[0])

    def shares_runs_with(self, other: Inspector) -> bool:
        """Whether the two are one loaded model with one codebook, so that `inspect_for` may judge frames of both."""
        return self._session is other._session and _name(self.codebook) == _name(other.codebook)

    def inspect_for(self, twins: Sequence[Inspector], frames: Sequence[Frame]) -> list[Inspection | InspectionError]:
        """One run for frames of one size, each judged by the threshold and labels of its own twin; an answer or an error per frame.

        Raises:
            InspectionError: the run as a whole failed, or a frame does not fit; then none has an answer.
        """
        own = self._edge
        outputs = self.run(np.stack([self._checked(frame) for frame in frames]), self.fetched, own.feed)
        answers: list[Inspection | InspectionError] = []
        for n, twin in enumerate(twins):
            # The graph compares with one threshold for the whole run; this is the same comparison, in float32.
            edge = twin._edge
            is_novel = np.asarray(outputs["novelty_score"] > np.float32(edge.threshold))
            try:
                if _name(edge.codebook) != _name(own.codebook):  # switched since the frames were chosen
                    answers.append(twin.inspect(frames[n]))
                    continue
                answers.append(twin._inspection({**outputs, "is_novel": is_novel}, n, edge))
            except InspectionError as error:
                # Its traceback would hold this function, and by that the pictures, until the garbage collector comes.
                answers.append(error.with_traceback(None))
        return answers

    def run(self, image: Frame, names: Sequence[str], overrides: Mapping[str, Vector] | None = None) -> Outputs:
        """The graph's own outputs for `image` (N, H, W, 3) uint8. `overrides` replace this inspector's codebook and threshold.

        Where the provider ignores overrides, what depends on them is computed from the graph's `embedding` (edge_dkm/head.py).

        Raises:
            InspectionError: the graph failed.
            UsageError: overrides that hold a part of a codebook.
        """
        feed = self._edge.feed if overrides is None else overrides
        if self.ran.head == "graph" or not feed:
            return self._run(image, names, feed)
        threshold = float(feed[THRESHOLD.name][0]) if THRESHOLD.name in feed else self.default_threshold
        if is_whole(feed):
            inputs = self.metadata.head_inputs
            own = self._run(image, tuple({*inputs, *set(names) - set(FETCHED)}), {})
            embedding, *joined = (np.asarray(own[name], np.float32) for name in inputs)
            outputs = own | compute_head(embedding, feed, threshold, self.metadata.l2, *joined)
        else:
            outputs = self._run(image, tuple({*names, "novelty_score"} - {"is_novel"}), {})
            outputs["is_novel"] = np.asarray(outputs["novelty_score"] > np.float32(threshold))
        return {name: outputs[name] for name in names}

    def _run(self, image: Frame, names: Sequence[str], feed: Mapping[str, Vector]) -> Outputs:
        session = self._open()
        options = ort.RunOptions()
        self._runs.add(options)
        try:
            if self.runtime.io_binding:
                values = run_bound(session, {IMAGE: image, **feed}, names, options)
            else:
                values = session.run(list(names), {IMAGE: image, **feed}, options)
        except Exception as error:  # onnxruntime raises many types; none of them may end the line
            raise InspectionError(
                "R-RUNTIME", f"{self.file.name} failed on a frame of {image.shape}: {first_line(error)}"
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

    def _inspection(self, outputs: Outputs, n: int, edge: _Edge) -> Inspection:
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
            edge.threshold,
            p_value,
            is_novel,
            verdict,
            reason,
            np.array(outputs["embedding"][n], np.float32),
            float(outputs[PATCH_SCORE][n]) if PATCH_SCORE in outputs else None,
            _name(edge.codebook),
        )


def _name(codebook: Codebook | None) -> str:
    return codebook.sha12 if codebook is not None else "base"


def _open_model(file: ModelFile, runtime: Runtime) -> tuple[Metadata, Opened]:
    """Checks the contract before a provider compiles anything, which may take minutes."""
    first = open_first(file, runtime)
    metadata = parse_metadata(first.session.get_modelmeta().custom_metadata_map, file.name)
    _check_contract(first.session, metadata, file.name)
    is_lowered = runtime.precision != "fp32" and not runs_on_cpu_alone(runtime)
    return metadata, (open_lowered if is_lowered else open_tried)(file, metadata, runtime, first)


def _check_contract(session: ort.InferenceSession, metadata: Metadata, name: str) -> None:
    def described(nodes: Sequence[ort.NodeArg]) -> dict[str, tuple[str, list[object]]]:
        return {node.name: (node.type, list(node.shape)) for node in nodes}

    sizes = {"K": metadata.n_clusters, "D": metadata.embed_dim}
    check_tensors(name, "input", described(session.get_inputs()), (INPUT,), {})
    check_tensors(name, "output", described(session.get_outputs()), metadata.outputs, sizes)
    check_tensors(name, "overridable input", described(session.get_overridable_initializers()), OVERRIDABLE, sizes)
    extra = [node.name for node in session.get_inputs() if node.name != IMAGE]
    if extra:
        raise ContractError(f"{name} demands the further inputs {', '.join(extra)}, expected '{IMAGE}' alone")


def _default_threshold(metadata: Metadata) -> float:
    threshold = metadata.novelty.get("threshold")
    return float(threshold) if isinstance(threshold, int | float) else 1.0
