"""``Profiler``: traces of chosen steps by JAX's profiler, for TensorBoard and xprof."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

from eventtrain.errors import ConfigurationError
from eventtrain.events import ProfileCaptured
from eventtrain.subscribers._shared.paths import directory_path, require_writable_folder
from eventtrain.subscribers._shared.worker_thread import in_own_thread
from eventtrain.subscribers.base import RunContext, Subscriber
from eventtrain.validation.annotations import checked
from eventtrain.validation.arguments import require_count

logger = logging.getLogger("eventtrain")


class Profiler(Subscriber):
    """Has JAX's profiler trace exactly the steps that are named here, or requested by ``control.profile(steps)``.

    Each range is written to a folder of its own, ``profile/steps-100-110``, and ``ProfileCaptured`` reports it;
    ``tensorboard --logdir profile`` shows it if the package xprof is installed. SubscriberFailed reports a trace that
    fails. A run that ends within a range has the steps until then.

    In a run of several processes each of them writes its own trace, to ``profile/steps-100-110/process-0`` and so on.

    Training waits while the device finishes the steps before a trace, and while the trace is written: some seconds
    for many steps. Trace few of them, and not the first one.

    Args:
        steps: first and last step of each range; both are traced.
        directory: of the traces, relative to ``run_dir``.
        python: also trace the calls of Python functions, which makes the steps slower and the trace larger.

    Raises:
        ConfigurationError: ranges are empty or overlap, or the directory is outside of ``run_dir``.
    """

    per_host = True  # a command of process 0 traces on each process

    @checked
    def __init__(
        self,
        steps: tuple[tuple[int, int], ...] = (),
        *,
        directory: str | Path = "profile",
        python: bool = False,
    ) -> None:
        for pair in steps:
            if not isinstance(pair, Sequence) or len(pair) != 2:  # pyright: ignore[reportUnnecessaryIsInstance]
                raise ConfigurationError(
                    f"Profiler(steps={steps!r}): steps must be pairs of a first and a last step, such as ((20, 22),)."
                )
            first, last = pair
            require_count("Profiler", "steps", first, at_least=1)
            require_count("Profiler", "steps", last, at_least=first)
        for (_, last), (first, end) in pairwise(sorted(steps)):
            if first <= last:
                raise ConfigurationError(
                    f"Profiler(steps=...): ({first}, {end}) begins before step {last} is over, the end of another "
                    "range. One trace is taken at a time: join the two."
                )
        self._steps = tuple(steps)
        self._directory = directory_path(directory, "Profiler")
        self._python = python

    async def start(self, run: RunContext) -> None:
        """Schedules the traces. Raises ConfigurationError if they cannot be written."""
        folder, owner = run.run_dir / self._directory, self.name or "Profiler"
        await in_own_thread(partial(require_writable_folder, folder, owner))
        run.schedule_traces(owner, folder, self._steps, python=self._python)

    async def on_profile_captured(self, event: ProfileCaptured) -> None:
        """Logs the path of the trace."""
        first, last = event.first_step, event.last_step
        logger.info("Steps %d to %d were traced; the trace is in %s", first, last, event.path)
