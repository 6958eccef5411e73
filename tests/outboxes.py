"""Drafts for an outbox, and what it holds in plain numbers."""

from __future__ import annotations

import json

from edge_dkm.outbox import Draft, Numbers, Outbox


def topic_of(camera: str) -> str:
    return f"t/{camera}/result"


def draft(camera: str = "top", result_id: str = "r", size: int = 100) -> Draft:
    def render(numbers: Numbers) -> bytes:
        body = {
            "schema": "dkm.result/1",
            "camera": camera,
            "cseq": numbers.cseq,
            "seq": numbers.seq,
            "pad": "x" * size,
        }
        return json.dumps(body).encode()

    return Draft(camera, topic_of(camera), result_id, render)


def cseqs(box: Outbox, camera: str = "top") -> list[int]:
    """The cseq of all unsent results of a camera, in the order of sending. They count as handed out from then on."""
    bodies = [(row.topic, json.loads(row.body)) for row in box.unsent(0, 10_000)]
    return [body["cseq"] for topic, body in bodies if topic == topic_of(camera) and body["schema"] == "dkm.result/1"]


def gaps(box: Outbox) -> list[tuple[str, int, int, str]]:
    """camera, from, to, reason of all unsent gap records. They count as handed out from then on."""
    bodies = [json.loads(row.body) for row in box.unsent(0, 10_000)]
    return [(b["camera"], b["from"], b["to"], b["reason"]) for b in bodies if b["schema"] == "dkm.gap/1"]
