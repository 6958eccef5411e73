"""The durable outbox: what is committed survives a power cut, and what a limit drops is declared. `Outbox` is all that others see."""

from __future__ import annotations

from edge_dkm.outbox.outbox import Mode, Outbox
from edge_dkm.outbox.retention import Limits
from edge_dkm.outbox.row import Draft, Intent, Kept, Numbers, OutboxStatus, Row

__all__ = ["Draft", "Intent", "Kept", "Limits", "Mode", "Numbers", "Outbox", "OutboxStatus", "Row"]
