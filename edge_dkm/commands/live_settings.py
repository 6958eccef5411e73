"""What operators change while the line runs and what survives a restart: pause, novelty threshold, names and verdicts of clusters.

Kept as JSON under one key of the outbox, written in one transaction with the answer to the command. For names and verdicts the
line file wins over a live label, and that over the model. `LiveControl` gives the handlers; the supervisor applies what it says.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edge_dkm.commands.commands import Handler, Outcome, refused
from edge_dkm.commands.decoder import Command, LabelArgs, PauseArgs, ThresholdArgs
from edge_dkm.contract import Cluster, Verdict
from edge_dkm.decision import Policy

KEY = "live"
ALL = "*"  # no camera has this name

log = logging.getLogger(__name__)


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True)


class Label(_Document):
    """What an operator calls a cluster, and what is to become of its parts."""

    name: str | None = None
    verdict: Verdict | None = None


class LiveThreshold(_Document):
    """A novelty threshold, and the line file's word at that time: when the file is edited, it holds again."""

    value: float = Field(gt=0, allow_inf_nan=False)
    instead_of: float | None = None


class LiveSettings(_Document):
    """The document. `thresholds`: camera or `*` -> threshold. `labels`: sha256 of a model -> cluster id -> label."""

    paused: bool = False
    pause_reason: str | None = None
    thresholds: dict[str, LiveThreshold] = Field(default_factory=dict)
    labels: dict[str, dict[int, Label]] = Field(default_factory=dict)

    @classmethod
    def read(cls, text: str | None) -> LiveSettings:
        """What `recall` gave; a damaged document is reported and begins anew, for the line must start."""
        if text is None:
            return cls()
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            log.error(
                "the live settings are damaged (%s) and begin anew: pause, threshold and labels are those of the files",
                error.errors(include_url=False)[0]["msg"],
            )
            return cls()

    def remember(self) -> dict[str, str]:
        """For `record_reply`."""
        return {KEY: self.model_dump_json(exclude_none=True)}


@dataclass(frozen=True)
class ModelTable:
    """The clusters as a model has them. Labels belong to the model: in another one, the same id is another kind of part."""

    sha256: str
    name: str
    clusters: tuple[Cluster, ...]


def effective_threshold(live: LiveSettings, camera: str, from_file: float | None) -> float | None:
    """The novelty threshold of a camera; None: the model's own."""
    threshold = live.thresholds.get(camera, live.thresholds.get(ALL))
    if threshold is None or threshold.instead_of != from_file:
        return from_file
    return threshold.value


def verdict_of_file(cluster: Cluster, policy: Policy) -> Verdict | None:
    """What the line file says of a cluster, by the model's name for it or by id."""
    return policy.clusters.get(cluster.name, policy.clusters.get(str(cluster.id)))


def effective_table(
    table: ModelTable, policy: Policy, labels: Mapping[int, Label]
) -> tuple[tuple[Cluster, ...], Policy]:
    """Clusters and policy for an Inspector: line file over live label over model.

    The verdicts stand in the clusters and the policy names none, since the keys of the line file mean the model's names:
    a label could otherwise steer another cluster's verdict.
    """
    rows = []
    for cluster in table.clusters:
        label = labels.get(cluster.id, Label())
        verdict = verdict_of_file(cluster, policy) or label.verdict or cluster.verdict
        rows.append(replace(cluster, name=label.name or cluster.name, verdict=verdict))
    return tuple(rows), replace(policy, clusters={})


@dataclass(frozen=True)
class LineFacts:
    """What the line file and the models say. `models`: by camera; `threshold`: the line file's, None where it has none."""

    models: Mapping[str, ModelTable]
    policy: Policy
    threshold: float | None = None


class LiveControl:
    """Holds the current live settings and handles the commands that change them (on the thread of `Commands`).

    Args:
        facts: of the line file and the models.
        recalled: what the store recalls under `KEY`.
        changed: applies new settings to the line; called after they are on disk.
    """

    def __init__(self, facts: LineFacts, recalled: str | None, changed: Callable[[LiveSettings], None]) -> None:
        self._facts, self._changed = facts, changed
        self.current = LiveSettings.read(recalled)
        self._report_overruled()

    @property
    def handlers(self) -> dict[str, Handler]:
        """By verb."""
        return {"pause": self._pause, "resume": self._resume, "threshold": self._threshold, "label": self._label}

    def threshold_of(self, camera: str) -> float | None:
        """The novelty threshold of a camera; None: the model's own."""
        return effective_threshold(self.current, camera, self._facts.threshold)

    def table_of(self, camera: str) -> tuple[tuple[Cluster, ...], Policy]:
        """Clusters and policy of a camera's Inspector."""
        table = self._facts.models[camera]
        return effective_table(table, self._facts.policy, self.current.labels.get(table.sha256, {}))

    def _change(self, new: LiveSettings, detail: str) -> Outcome:
        def apply() -> None:
            self.current = new
            self._changed(new)

        return Outcome(True, None, detail, new.remember(), apply)

    def _pause(self, command: Command) -> Outcome:
        args = command.arguments(PauseArgs)
        detail = "paused already" if self.current.paused else "paused"
        return self._change(self.current.model_copy(update={"paused": True, "pause_reason": args.reason}), detail)

    def _resume(self, command: Command) -> Outcome:
        detail = "resumed" if self.current.paused else "was not paused"
        return self._change(self.current.model_copy(update={"paused": False, "pause_reason": None}), detail)

    def _threshold(self, command: Command) -> Outcome:
        args = command.arguments(ThresholdArgs)
        if (unknown := self._unknown_camera(args.camera)) is not None:
            return unknown
        threshold = LiveThreshold(value=args.value, instead_of=self._facts.threshold)
        # For all cameras: the last word, so no earlier word for one of them stays.
        others = self.current.thresholds if args.camera is not None else {}
        new = self.current.model_copy(update={"thresholds": {**others, args.camera or ALL: threshold}})
        return self._change(new, f"novelty_threshold is {args.value:g} for {args.camera or 'all cameras'}")

    def _label(self, command: Command) -> Outcome:
        args = command.arguments(LabelArgs)
        if (unknown := self._unknown_camera(args.camera)) is not None:
            return unknown
        tables = {t.sha256: t for name, t in self._facts.models.items() if args.camera in {None, name}}
        if len(tables) != 1:
            detail = f"the cameras {', '.join(self._facts.models)} have different models, expected args.camera"
            return refused("CMD-CAMERA", detail)
        table = next(iter(tables.values()))
        cluster = next((c for c in table.clusters if c.id == args.cluster), None)
        if cluster is None:
            known = f"0 to {len(table.clusters) - 1}"
            return refused("CMD-CLUSTER", f"{table.name} has no cluster {args.cluster}, expected {known}")
        labels = self.current.labels.get(table.sha256, {})
        conflict = self._conflict(args, cluster, effective_table(table, self._facts.policy, labels)[0])
        if conflict is not None:
            return conflict
        before = labels.get(cluster.id, Label())
        label = Label(name=args.name or before.name, verdict=args.verdict or before.verdict)
        changed = {**self.current.labels, table.sha256: {**labels, cluster.id: label}}
        said = [f"name {args.name}"] * (args.name is not None) + [f"verdict {args.verdict}"] * (
            args.verdict is not None
        )
        new = self.current.model_copy(update={"labels": changed})
        return self._change(new, f"cluster {cluster.id} of {table.name} has the {' and the '.join(said)}")

    def _conflict(self, args: LabelArgs, cluster: Cluster, clusters: tuple[Cluster, ...]) -> Outcome | None:
        decided = verdict_of_file(cluster, self._facts.policy)
        if args.verdict is not None and decided is not None and args.verdict != decided:
            detail = (
                f"verdicts.clusters of the line file says {decided} for cluster {cluster.id} {cluster.name}, "
                f"which wins over {args.verdict}; change it there"
            )
            return refused("CMD-LINE-FILE", detail)
        taken = next((c for c in clusters if c.name == args.name and c.id != cluster.id), None)
        if taken is not None:
            return refused("CMD-NAME-TAKEN", f"cluster {taken.id} has the name {taken.name} already")
        return None

    def _unknown_camera(self, camera: str | None) -> Outcome | None:
        if camera is None or camera in self._facts.models:
            return None
        detail = f"there is no camera {camera}, this line has {', '.join(self._facts.models)}"
        return refused("CMD-CAMERA", detail)

    def _report_overruled(self) -> None:
        """At start: live settings that have lost to a file or a model since."""
        file = self._facts.threshold
        for camera, threshold in self.current.thresholds.items():
            if threshold.instead_of != file:
                log.warning(
                    "the live novelty_threshold %g of camera %s was set instead of %s, the line file now says %s: that holds",
                    threshold.value,
                    camera,
                    threshold.instead_of,
                    file,
                )
        for sha256 in self.current.labels.keys() - {table.sha256 for table in self._facts.models.values()}:
            log.info("live labels of the model %s are kept but belong to no model of this line", sha256[:12])
