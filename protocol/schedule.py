"""Learning-rate schedules: the factor applied to the base rate at each step."""

from __future__ import annotations

from fwdllm.protocol.settings import SCHEDULES


def lr_factor(step: int, steps: int, warmup: int, schedule: str = "linear") -> float:
    """The factor in (0, 1] for the update after ``step`` completed ones, 0 <= step < steps.

    Warmup rises linearly and reaches 1 on its last step. Then ``linear`` falls linearly and
    would reach 0 at ``steps``, one past the last update, so that no update is wasted on a
    rate of 0; ``constant`` stays at 1. ValueError on an unknown schedule.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule {schedule!r} is not one of {', '.join(SCHEDULES)}")
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    return (steps - step) / (steps - warmup)
