"""What a camera must say before its verdicts may move parts."""

from __future__ import annotations

from devices.outputs.base import OutputSettings


def output_problem(output: OutputSettings, trigger_kind: str, deadline_ms: int | None) -> str | None:
    """What is missing for a reject output to be safe, as `key is value, expected ...`; None if nothing is."""
    if trigger_kind == "free":
        return "trigger.kind is free, expected a trigger that stands for a part where there is an output"
    if deadline_ms is None:
        return "deadline_ms is null, expected the milliseconds from the trigger to when the PLC reads the output"
    if output.hold_ms is None and "hold_ms" not in output.model_fields_set:
        return (
            "output.hold_ms is not given, expected less than the milliseconds between two parts, "
            "or null where the machine itself takes every OK back"
        )
    return None
