"""`edge-dkm recentre`: reads what a station has kept, makes a codebook, and has the station switch to it, whether it runs or not.

The command is a process of its own, at low priority: the line goes on inspecting meanwhile. Only the switch goes through the admin socket; while
no station runs on the state folder, the command takes the folder's lock and writes the choice down for the next start.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from edge_dkm.clock import rfc3339, utc_now, wall_s
from edge_dkm.codebook import write_codebook
from edge_dkm.codebook_record import BASE, CodebookRecord, How
from edge_dkm.errors import LockedError, ModelError, StorageError, UsageError
from edge_dkm.golden import PART, Golden, load_golden
from edge_dkm.inspector import Inspector, Runtime
from edge_dkm.model_file import golden_path
from edge_dkm.recentring.checks import GoldenParts
from edge_dkm.recentring.recentre import Options, Proposal, recentre
from edge_dkm.recentring.refusal import RefusedError
from edge_dkm.recentring.reservoir import Rows, read_rows, reservoir_path
from edge_dkm.recentring.scoring import Space
from edge_dkm.service.admin_client import ask
from edge_dkm.settings import LineSettings
from edge_dkm.state import StateFolder
from edge_dkm.station_codebooks import in_force, read_named


@dataclass(frozen=True)
class Wish:
    """`camera` None: all. `hours`: only parts of the last hours. `target_frr` None: the model's own. `dry_run`: computed, not written."""

    camera: str | None = None
    hours: float | None = None
    target_frr: float | None = None
    dry_run: bool = False


@dataclass(frozen=True)
class Done:
    """What became of one camera. `codebook`: the new one; None where it was refused (`refusal`) or not written (dry run)."""

    camera: str
    running: str
    codebook: str | None = None
    refusal: RefusedError | None = None
    figures: dict[str, Any] = field(default_factory=dict)
    switched: Literal["running", "at the next start"] | None = None
    seconds: float = 0.0

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        refusal = self.refusal.plain() if self.refusal else None
        return {
            "camera": self.camera,
            "running": self.running,
            "ok": self.refusal is None,
            "codebook": self.codebook,
            "switched": self.switched,
            "recommended": self.refusal.recommended if self.refusal else "none",
            "refusal": refusal,
            "figures": self.figures or (self.refusal.figures if self.refusal else {}),
            "seconds": round(self.seconds, 2),
        }


class Station:
    """A station's state folder and models, as its line file names them. `close` frees the models."""

    def __init__(self, settings: LineSettings) -> None:
        self._settings, self._record = settings, CodebookRecord(settings.state)
        self._opened: dict[str, Inspector] = {}

    def __enter__(self) -> Station:
        return self

    def __exit__(self, *_: object) -> None:
        for inspector in self._opened.values():
            inspector.close()

    def recentre(self, wish: Wish) -> Iterator[Done]:
        """One camera after the other; a refusal is an answer, not an error.

        Raises:
            EdgeError: no such camera, hours or rate that are none, no usable model, or the station does not switch.
        """
        if wish.hours is not None and not wish.hours > 0:
            raise UsageError(f"--hours is {wish.hours:g}, expected more than 0")
        if wish.target_frr is not None and not 0 < wish.target_frr < 1:
            raise UsageError(f"--target-frr is {wish.target_frr:g}, expected a share between 0 and 1, as 0.01")
        for camera in self._cameras(wish.camera):
            yield self._one(camera, wish)

    def roll_back(self, camera: str | None, to: str | None) -> Iterator[Done]:
        """To `base`, a codebook by its digest, or, without a name, what ran before.

        Raises:
            UsageError: that is in force already (everywhere, where no camera is named), or the codebook is one camera's and none is named.
            ModelError: there is no such codebook, or it is damaged; what judged goes on.
        """
        names = self._cameras(camera)
        if to not in {None, BASE} and len(names) > 1:
            raise UsageError(f"codebook {to} is of one camera; name it with --camera, one of {', '.join(names)}")
        running = {name: self._record.current(name, self._inspector(name).file.sha256) for name in names}
        if all(current.codebook == (to or BASE) for current in running.values()):
            raise UsageError(
                f"{'camera' if len(names) == 1 else 'cameras'} {', '.join(names)} judge{'s' if len(names) == 1 else ''} by codebook "
                f"{to or BASE} already; --list says which there are"
            )
        for name, current in running.items():
            if current.codebook == (to or BASE):
                continue
            inspector = self._inspector(name)
            wanted = to or (current.chain[0] if current.chain else BASE)
            read_named(self._record, wanted, name, inspector)  # says at once what is wrong with it
            yield Done(name, current.codebook, wanted, switched=self._switch(name, inspector, wanted, "rollback"))

    def listed(self, camera: str | None) -> Iterator[dict[str, Any]]:
        """Per camera what is in force and what there is besides."""
        for name in self._cameras(camera):
            inspector = self._inspector(name)
            found = in_force(self._record, name, inspector)
            others = []
            for path in sorted(
                self._record.folder.glob("*.safetensors"), key=lambda p: p.stat().st_mtime, reverse=True
            ):
                with contextlib.suppress(ModelError):  # damaged, or of another model
                    book = inspector.read_codebook(path)
                    if book.metadata.get("camera", name) == name:
                        others.append({"codebook": path.stem, **dict(book.metadata)})
            yield {"camera": name, **found.plain(), "chain": list(found.current.chain), "codebooks": others}

    def _one(self, camera: str, wish: Wish) -> Done:
        started_s = time.monotonic()
        inspector = self._inspector(camera)
        running = in_force(self._record, camera, inspector)
        try:
            golden = _golden(inspector)
            options = self._options(inspector, wish)
            tensors = running.codebook.tensors if running.codebook is not None else golden.codebook
            space = Space(inspector.metadata.n_clusters, inspector.metadata.embed_dim, inspector.metadata.l2)
            rows, parts = self._rows(camera, inspector, wish), _golden_parts(inspector, golden)
            proposal = recentre(rows, tensors, space, options, parts, golden.codebook)
        except RefusedError as refusal:
            return Done(camera, running.name, refusal=refusal, seconds=time.monotonic() - started_s)
        if wish.dry_run:
            return Done(camera, running.name, figures=proposal.figures, seconds=time.monotonic() - started_s)
        name = self._written(camera, inspector, proposal, running.name)
        switched = self._switch(camera, inspector, name, "recentre")
        return Done(camera, running.name, name, None, proposal.figures, switched, time.monotonic() - started_s)

    def _rows(self, camera: str, inspector: Inspector, wish: Wish) -> Rows:
        """Those kept for the model; none where there is no file yet.

        Raises:
            RefusedError: there are none that can be used.
        """
        path = reservoir_path(self._settings.state, camera, inspector.file.sha256)
        try:
            rows = read_rows(path, inspector.file.sha256, inspector.metadata.embed_dim)
        except StorageError as error:
            raise RefusedError("no_rows", str(error), "wait") from None
        if wish.hours is None:
            return rows
        recent = rows.where(rows.minute >= (wall_s() - wish.hours * 3600) // 60)
        if len(rows) and not len(recent):
            raise RefusedError(
                "no_rows", f"none of the {len(rows)} parts that were kept is of the last {wish.hours:g} hours", "wait"
            )
        return recent

    def _options(self, inspector: Inspector, wish: Wish) -> Options:
        novelty = inspector.metadata.novelty
        target_frr = wish.target_frr if wish.target_frr is not None else novelty.get("target_frr")
        if not isinstance(target_frr, int | float) or not 0 < target_frr < 1:
            raise RefusedError(
                "uncalibrated",
                f"{inspector.file.name} was trained with novelty: none, so there is no rate to keep; name one with --target-frr",
                "none",
            )
        unit: Literal["part", "group"] = "group" if novelty.get("unit") == "group" else "part"
        verdicts = self._settings.verdicts.clusters
        rejected = frozenset(
            cluster.id
            for cluster in inspector.metadata.clusters
            if verdicts.get(cluster.name, verdicts.get(str(cluster.id), cluster.verdict)) == "reject"
        )
        return Options(float(target_frr), unit, rejected)

    def _written(self, camera: str, inspector: Inspector, proposal: Proposal, parent: str) -> str:
        figures, calibration = proposal.figures, proposal.calibration
        metadata = {
            "model_sha256": inspector.file.sha256,
            "alpha": f"{calibration.target_frr:g}",
            "promised_frr": f"{calibration.promised_frr:.6g}",
            "n": str(calibration.parts),
            "groups": str(calibration.groups),
            "novel_share": str(figures["novel_share"]),
            "created": rfc3339(utc_now()),
            "parent": parent,
            "camera": camera,
        }
        try:
            return write_codebook(self._record.folder, proposal.tensors, metadata).stem
        except OSError as error:
            raise StorageError(
                f"S-IO {self._record.folder} cannot be written: {error.strerror or error}; codebook {parent} goes on"
            ) from None

    def _switch(
        self, camera: str, inspector: Inspector, name: str, how: How
    ) -> Literal["running", "at the next start"]:
        state = self._settings.state
        try:
            with StateFolder(state):
                self._record.switch(camera, inspector.file.sha256, name, how)
        except LockedError:
            ask(state, "codebook", {"camera": camera, "codebook": name, "how": how})
            return "running"
        return "at the next start"

    def _cameras(self, wanted: str | None) -> list[str]:
        names = list(self._settings.cameras)
        if wanted is not None and wanted not in names:
            raise UsageError(f"--camera is {wanted}, expected one of {', '.join(names)}")
        if not self._settings.state.is_dir():
            raise StorageError(f"state folder {self._settings.state} is not there; has this line ever run?")
        return names if wanted is None else [wanted]

    def _inspector(self, camera: str) -> Inspector:
        path = self._settings.cameras[camera].model or self._settings.model or ""
        if path not in self._opened:
            self._opened[path] = Inspector(path, runtime=Runtime(threads=1))
        return self._opened[path]


def _golden(inspector: Inspector) -> Golden:
    return load_golden(golden_path(cast(Path, inspector.file.path)), inspector.metadata.golden_sha256)


def _golden_parts(inspector: Inspector, golden: Golden) -> GoldenParts | None:
    """Of the decisive images of parts, in the graph's own embedding."""
    chosen = [n for n, kind in enumerate(golden.kinds) if kind == PART and golden.is_decisive(n)]
    if not chosen:
        return None
    rows = [inspector.run(golden.images[n][None], ("embedding",), overrides={})["embedding"] for n in chosen]
    return GoldenParts(np.concatenate(rows).astype(np.float32), golden.distances[chosen].argmin(1))


def text(done: Done) -> str:
    """For people."""
    if done.refusal is not None:
        return (
            f"refused   {done.camera}: {done.refusal.detail}\n          recommended: {done.refusal.recommended}; "
            f"codebook {done.running} goes on"
        )
    figures = done.figures
    if not figures:
        return f"switched  {done.camera}: from codebook {done.running} to {done.codebook} ({done.switched})"
    held, promised, target = figures["held_out"], figures["promised_frr"], figures["target_frr"]
    lines = [
        f"recentred {done.camera}: codebook {done.codebook} instead of {done.running} ({done.switched})"
        if done.codebook
        else f"dry run   {done.camera}: nothing is written; codebook {done.running} goes on",
        f"          {figures['rows']} parts kept, {figures['novel_share']:.2%} of them novel and {figures['rejected_share']:.2%} rejected: "
        f"left out (at most {figures['excluded_limit']:.2%} may be)",
        f"          of the newest {held['groups']} parts it calls {held['flagged']} novel, {held['low']} to {held['high']} are expected; "
        f"the running one called {held['before']} of them novel",
        f"          promises at most {promised:.2%} false rejects{'' if promised <= target else f', NOT the {target:.2%} that were asked'}",
    ]
    if figures["edge"] == "training":
        lines.append(
            "          the edge is that of the training: too few groups, or too many novel parts, to measure another"
        )
    if figures["kept_clusters"]:
        lines.append(f"          clusters {figures['kept_clusters']} had too few parts and stay as they were")
    return "\n".join(lines)
