"""What commands were answered and what they changed, in the outbox's database: a command that comes twice is carried out once."""

from __future__ import annotations

from collections.abc import Mapping

from edge_dkm.outbox.file import Database, OutboxFile

KEPT = 1000


class Replies:
    """The newest 1000 answers by command id, and settings by key. Called by Outbox under its lock."""

    def __init__(self, file: OutboxFile) -> None:
        self._file = file

    def find(self, command_id: str) -> bytes | None:
        """The answer that this command got before."""
        found = self._file.read("SELECT reply FROM reply WHERE command_id = ?", (command_id,))
        return bytes(found[0][0]) if found else None

    def record(self, db: Database, command_id: str, reply: bytes, remember: Mapping[str, str]) -> None:
        """Within a transaction: writes the answer and the settings."""
        db.execute("INSERT OR REPLACE INTO reply(command_id, reply) VALUES (?, ?)", (command_id, reply))
        db.execute("DELETE FROM reply WHERE n <= (SELECT MAX(n) FROM reply) - ?", (KEPT,))
        for key, value in remember.items():
            db.execute("INSERT OR REPLACE INTO note VALUES (?, ?)", (key, value))

    def recall(self, key: str) -> str | None:
        """A setting that was recorded."""
        found = self._file.read("SELECT value FROM note WHERE key = ?", (key,))
        return str(found[0][0]) if found else None
