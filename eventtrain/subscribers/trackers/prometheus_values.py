"""``Seen`` and ``Figures``: what a PrometheusExporter knows of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from eventtrain.events import CheckpointCommitted, EpochCompleted, EvalCompleted, StepsCompleted
from eventtrain.events.models import Number
from eventtrain.subscribers.base import RunContext


@dataclass
class Seen:
    """The newest of everything. Written by handlers, read by the threads that answer a scrape.

    What a field holds is never changed, only replaced, so that no reader needs a lock.
    """

    run_id: str = ""
    run: RunContext | None = None
    """None once the run has ended."""
    step: int = 0
    window: StepsCompleted | None = None
    epoch: EpochCompleted | None = None
    evaluation: EvalCompleted | None = None
    committed: CheckpointCommitted | None = None
    checkpoints: Mapping[str, int] = field(
        default_factory=lambda: {"committed": 0, "failed": 0, "skipped": 0}
    )
    alerts: Mapping[tuple[str, str], int] = field(default_factory=dict[tuple[str, str], int])
    """(name, severity) -> 1 while it is raised, then 0."""
    at_end: Figures | None = None


@dataclass(frozen=True)
class Figures:
    """What is asked for at the moment of a scrape."""

    hyperparams: Mapping[str, Number]
    duration_s: float
    loop_seconds: Mapping[str, float]
    subscriptions: Mapping[str, Mapping[str, float]]

    @classmethod
    def of(cls, run: RunContext) -> Figures:
        """Those of this moment. Any thread; never blocks."""
        loop = run.loop_statistics()
        return cls(
            dict(run.control.hyperparams),
            loop.duration_s,
            {
                one.name.removesuffix("_s"): getattr(loop, one.name)
                for one in fields(loop)
                if one.name.endswith("_s") and one.name != "duration_s"
            },
            {
                name: {
                    "active": statistics.state == "active",
                    **{one.name: getattr(statistics, one.name) for one in fields(statistics)[2:]},
                }
                for name, statistics in run.statistics().items()
            },
        )
