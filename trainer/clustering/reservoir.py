"""A uniform sample of fixed size from a stream of unknown length; streaming methods seed, scale and monitor with it.

Source: Vitter, "Random sampling with a reservoir", 1985, Algorithm R: row number t (from 0) draws a place in 0..t and takes it if the
reservoir has that place. Differs from the paper: a batch draws all its places at once, and the last row of a batch wins a place, which
is what one row after the other would leave.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Reservoir:
    """At most `size` of the rows (D,) offered so far, each with equal probability; the first `size` rows fill it in order."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.seen = 0
        self._places = torch.empty(0, 0)

    @property
    def rows(self) -> Tensor:
        """The sample (n, D), n the smaller of `size` and the rows seen."""
        return self._places[: min(self.seen, self.size)]

    def offer(self, rows: Tensor, generator: torch.Generator) -> None:
        """Takes some of rows (B, D); `generator` lies on the CPU and is asked for B numbers, whatever is taken."""
        if not len(self._places):
            self._places = rows.new_empty(self.size, rows.shape[1])
        number = torch.arange(len(rows))
        arrival = self.seen + number
        drawn = (torch.rand(len(rows), generator=generator, dtype=torch.float64) * (arrival + 1)).long()
        place = torch.where(arrival < self.size, arrival, drawn)
        stays = place < self.size
        # Two rows of a batch may draw one place; assigning by a repeated index would leave open which of them is kept.
        winner = torch.full((self.size,), -1).scatter_reduce_(0, place[stays], number[stays], "amax")
        taken = torch.nonzero(winner >= 0)[:, 0]
        self._places[taken.to(rows.device)] = rows[winner[taken].to(rows.device)]
        self.seen += len(rows)

    def state(self) -> dict[str, Tensor]:
        """What `load_state` needs to continue exactly here."""
        return {"rows": self.rows.clone(), "seen": torch.tensor(self.seen)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continues from `state`, on the device of its rows."""
        self.seen = int(state["seen"])
        self._places = state["rows"].new_empty(self.size, state["rows"].shape[1]) if self.seen else torch.empty(0, 0)
        self._places[: len(state["rows"])] = state["rows"]
