"""The reference that drift is measured against: the exported model and the line's own measures, run on the run's held-out good images."""

from __future__ import annotations

from typing import Any

import numpy as np

from edge_dkm.drift.quality import measure
from edge_dkm.drift.reference import KEY, describe
from edge_dkm.drift.statistic import Sighting
from edge_dkm.errors import EdgeError
from edge_dkm.inspector import Inspector
from exporters.errors import ExportError
from exporters.own_images import OwnImage, find_held_out_good
from trainer.artifact import Run

WHY = "why"  # in dkm.reference_hist, where there is no reference of pictures and embeddings


def drift_reference(run: Run, inspector: Inspector, frame: tuple[int, int] | None) -> dict[str, Any]:
    """`dkm.reference_hist`: shares and novelty_quantiles of the run, and `drift` of its images, or `why` there is none.

    Args:
        inspector: the model as it will be written.
        frame: (height, width) where the graph's input is fixed.
    """
    known: dict[str, Any] = dict(run.info["reference"])
    try:
        images = find_held_out_good(run, frame)
        sightings = [_sighting(inspector, image) for image in images]
        found = describe(sightings, np.array([image.group for image in images]), known["shares"])
    except (ExportError, EdgeError, ValueError) as error:
        return known | {WHY: str(error)}
    return known | {KEY: found}


def reference_sentence(reference: dict[str, Any]) -> str:
    """For people."""
    if KEY not in reference:
        return f"clusters and novelty alone are watched: {reference[WHY]}"
    found = reference[KEY]
    return f"against {found['parts']} held-out good parts of {found['groups']} groups"


def _sighting(inspector: Inspector, image: OwnImage) -> Sighting:
    pixels = image.read()
    answer = inspector.inspect(pixels)
    return Sighting(answer.embedding, answer.cluster.id, answer.novelty_score, measure(pixels))
