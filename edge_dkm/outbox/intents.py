"""Triggers that stand for a part and have no result yet, in the outbox's database: after a restart each ends in a declared one."""

from __future__ import annotations

from dataclasses import astuple

from edge_dkm.outbox.file import Database, OutboxFile
from edge_dkm.outbox.row import Intent

COLUMNS = "result_id, camera, kind, trigger_id, ts, part_id, product"  # in the order of Intent


class Intents:
    """Called by Outbox under its lock."""

    def __init__(self, file: OutboxFile) -> None:
        self._file = file

    def add(self, db: Database, intent: Intent) -> None:
        """Within a transaction."""
        db.execute(f"INSERT INTO intent({COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?)", astuple(intent))

    def close(self, db: Database, result_id: str) -> None:
        """Within the transaction of the result."""
        db.execute("DELETE FROM intent WHERE result_id = ?", (result_id,))

    def open(self) -> list[Intent]:
        """In the order of the triggers."""
        return [Intent(*row) for row in self._file.read(f"SELECT {COLUMNS} FROM intent ORDER BY rowid")]
