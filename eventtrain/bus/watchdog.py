"""Watchdog: a thread that observes the event loop from outside, because a blocked loop cannot report itself."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from time import perf_counter
from weakref import WeakKeyDictionary

from eventtrain.bus.subscription import SubscriptionCore

logger = logging.getLogger("eventtrain")


class Watchdog:
    """Logs each handler that blocks the event loop, or uses more CPU than its budget, with the figure.

    A handler is logged again only when its figure has doubled.

    Args:
        subscriptions: returns those to look at.
        ping: asks the event loop for a sign of life.
    """

    def __init__(
        self,
        subscriptions: Callable[[], Iterable[SubscriptionCore]],
        ping: Callable[[], object],
        *,
        block_warning_s: float,
        cpu_budget: float,
        interval_s: float = 0.25,
    ) -> None:
        self._subscriptions = subscriptions
        self._ping = ping
        self._block_warning_s = block_warning_s
        self._cpu_budget = cpu_budget
        self._interval_s = interval_s
        # Weak keys, because a service may subscribe for each of its requests.
        self._longest_block_s: WeakKeyDictionary[SubscriptionCore, float] = WeakKeyDictionary()
        self._highest_share: WeakKeyDictionary[SubscriptionCore, float] = WeakKeyDictionary()
        self._last_look: WeakKeyDictionary[SubscriptionCore, tuple[float, float]] = WeakKeyDictionary()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="eventtrain-watchdog", daemon=True)

    def start(self) -> None:
        """Starts the thread, which looks every ``interval_s`` seconds."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread and looks once more. Blocks."""
        self._stop.set()
        self._thread.join()
        self.look(perf_counter())

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            self._ping()
            self.look(perf_counter())

    def look(self, now_s: float) -> None:
        """Checks every subscription at the time ``now_s`` (``perf_counter``)."""
        for subscription in self._subscriptions():
            self._check_blocking(subscription, now_s)
            self._check_cpu(subscription, now_s)

    def _check_blocking(self, subscription: SubscriptionCore, now_s: float) -> None:
        began_s = subscription.cost.slice_began
        running_s = now_s - began_s if began_s is not None else 0.0
        held_s = max(subscription.cost.longest_slice_s, running_s)
        if held_s > max(self._block_warning_s, 2 * self._longest_block_s.get(subscription, 0.0)):
            self._longest_block_s[subscription] = held_s
            logger.warning(
                "Subscriber %s held the event loop for %.3f s%s; every other subscriber waited. Await something, "
                "or make the handler a plain function, which runs in a thread.",
                subscription.name, held_s, " so far" if running_s == held_s else "",
            )  # fmt: skip

    def _check_cpu(self, subscription: SubscriptionCore, now_s: float) -> None:
        cpu_s = subscription.cost.cpu_s
        last_s, last_cpu_s = self._last_look.setdefault(subscription, (now_s, cpu_s))
        if now_s - last_s < 1.0:
            return
        self._last_look[subscription] = (now_s, cpu_s)
        share = (cpu_s - last_cpu_s) / (now_s - last_s)
        if share > max(self._cpu_budget, 2 * self._highest_share.get(subscription, 0.0)):
            self._highest_share[subscription] = share
            logger.warning(
                "Subscriber %s used %.0f%% of a CPU core over the last %.1f s (budget %.0f%%), which slows training "
                "through the interpreter lock. Subscribe with every=, to StepsCompleted, or do the work in a process.",
                subscription.name, 100 * share, now_s - last_s, 100 * self._cpu_budget,
            )  # fmt: skip
