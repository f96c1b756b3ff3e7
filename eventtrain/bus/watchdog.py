"""A thread that looks at the event loop from outside, since a blocked loop cannot report itself."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from time import perf_counter
from weakref import WeakKeyDictionary

from eventtrain.bus.subscription import Subscription

logger = logging.getLogger("eventtrain")


class Watchdog:
    """Names, in a log line with the figure, each handler that holds the event loop or burns CPU past a budget.

    A handler is named again only when its figure has doubled.
    """

    def __init__(
        self,
        subscriptions: Callable[[], Iterable[Subscription]],
        *,
        block_warning_s: float,
        cpu_budget: float,
        interval_s: float = 0.25,
    ) -> None:
        self._subscriptions = subscriptions
        self._block_warning_s = block_warning_s
        self._cpu_budget = cpu_budget
        self._interval_s = interval_s
        # Weak: a service may subscribe for each of its requests.
        self._blocked: WeakKeyDictionary[Subscription, float] = WeakKeyDictionary()
        self._burning: WeakKeyDictionary[Subscription, float] = WeakKeyDictionary()
        self._last: WeakKeyDictionary[Subscription, tuple[float, float]] = WeakKeyDictionary()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="eventtrain-watchdog", daemon=True)

    def start(self) -> None:
        """Begin to look every ``interval_s`` seconds."""
        self._thread.start()

    def stop(self) -> None:
        """Look once more, then end the thread."""
        self._stop.set()
        self._thread.join()
        self.look(perf_counter())

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            self.look(perf_counter())

    def look(self, now_s: float) -> None:
        """Check every subscription at the time ``now_s`` (of ``perf_counter``)."""
        for subscription in self._subscriptions():
            self._look_for_blocking(subscription, now_s)
            self._look_for_burning(subscription, now_s)

    def _look_for_blocking(self, subscription: Subscription, now_s: float) -> None:
        began_s = subscription.meter.slice_began
        running_s = now_s - began_s if began_s is not None else 0.0
        held_s = max(subscription.meter.longest_slice_s, running_s)
        if held_s > max(self._block_warning_s, 2 * self._blocked.get(subscription, 0.0)):
            self._blocked[subscription] = held_s
            logger.warning(
                "Subscriber %s held the event loop for %.3f s%s; every other subscriber waited. Await something, "
                "or make the handler a plain function, which runs in a thread.",
                subscription.name, held_s, " so far" if running_s == held_s else "",
            )  # fmt: skip

    def _look_for_burning(self, subscription: Subscription, now_s: float) -> None:
        cpu_s = subscription.meter.cpu_s
        last_s, last_cpu_s = self._last.setdefault(subscription, (now_s, cpu_s))
        if now_s - last_s < 1.0:
            return
        self._last[subscription] = (now_s, cpu_s)
        share = (cpu_s - last_cpu_s) / (now_s - last_s)
        if share > max(self._cpu_budget, 2 * self._burning.get(subscription, 0.0)):
            self._burning[subscription] = share
            logger.warning(
                "Subscriber %s used %.0f%% of a CPU core over the last %.1f s (budget %.0f%%), which slows training "
                "through the interpreter lock. Subscribe with every=, to StepsCompleted, or do the work in a process.",
                subscription.name, 100 * share, now_s - last_s, 100 * self._cpu_budget,
            )  # fmt: skip
