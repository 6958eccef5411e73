from __future__ import annotations

from edge_dkm.paired_runs import paired_ms


def test_all_steps_run_in_each_round_and_another_one_begins_each() -> None:
    order: list[str] = []
    steps = {"a": lambda: order.append("a"), "b": lambda: order.append("b"), "c": lambda: order.append("c")}
    taken = paired_ms(steps, rounds=3, warm_up=1)
    assert "".join(order) == "abc" + "bca" + "cab" + "abc"
    assert {key: len(ms) for key, ms in taken.items()} == {"a": 3, "b": 3, "c": 3}
    assert all(value >= 0 for ms in taken.values() for value in ms)


def test_it_ends_after_the_run_in_which_it_is_over_and_counts_whole_rounds_only() -> None:
    order: list[str] = []
    steps = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    taken = paired_ms(steps, rounds=9, warm_up=1, is_over=lambda: len(order) >= 7)
    assert "".join(order) == "ab" + "ba" + "ab" + "b"
    assert {key: len(ms) for key, ms in taken.items()} == {"a": 2, "b": 2}
    assert paired_ms(steps, rounds=9, is_over=lambda: True) == {"a": [], "b": []} and len(order) == 7
