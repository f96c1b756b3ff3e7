"""Which events a policy goes by for each unit of patience, and with what lag. Shared by the policies with a monitor."""

from __future__ import annotations

from eventtrain.events import EpochCompleted, EvalCompleted, StepCompleted
from eventtrain.subscribers._shared.metric_goal import Unit

WATCHED: dict[Unit, type[EpochCompleted] | type[EvalCompleted] | type[StepCompleted]] = {
    "epochs": EpochCompleted,
    "steps": StepCompleted,
    "evaluations": EvalCompleted,
    "seconds": EpochCompleted,
}

STEP_LAG = 64
"""Default of policies that decide on every step: four times ``max_in_flight_steps``, so that the loop need not wait."""

LAGS: dict[Unit, int | None] = {"epochs": 0, "steps": STEP_LAG, "evaluations": 0, "seconds": None}
"""None where a decision by the clock could not be repeated anyway."""
