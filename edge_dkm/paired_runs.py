"""Times several ways of one thing in turns, so that whatever disturbs the machine disturbs all of them; the times of one round are compared."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)


def paired_ms(
    steps: Mapping[Key, Callable[[], object]],
    rounds: int,
    warm_up: int = 1,
    is_over: Callable[[], bool] | None = None,
) -> dict[Key, list[float]]:
    """Milliseconds of each step, by its key: the n-th of all are from one round. Another step begins each round, since one heats the cache.

    Args:
        rounds: how many are counted; fewer where `is_over` said so.
        warm_up: rounds before those.
        is_over: asked before the first run and after each; the round that it ends in is not counted.

    Raises:
        Exception: whatever a step raises.
    """
    taken: dict[Key, list[float]] = {key: [] for key in steps}
    keys = list(steps)
    if is_over is not None and is_over():
        return taken
    for n in range(warm_up + rounds):
        this_round: dict[Key, float] = {}
        for key in keys[n % len(keys) :] + keys[: n % len(keys)]:
            started_s = time.perf_counter()
            steps[key]()
            this_round[key] = (time.perf_counter() - started_s) * 1000
            if is_over is not None and is_over():
                return taken
        if n >= warm_up:
            for key, ms in this_round.items():
                taken[key].append(ms)
    return taken
