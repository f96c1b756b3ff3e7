"""``RegistryThread``: registers one version of a model after the other."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, TypeVar

from eventtrain.errors import StorageError
from eventtrain.events import Event, SubscriberFailed
from eventtrain.subscribers._shared.retry import retry
from eventtrain.subscribers._shared.worker_thread import WorkerThread

logger = logging.getLogger("eventtrain")

T = TypeVar("T")


@dataclass(frozen=True)
class Version:
    """What is registered.

    Attributes:
        source: where the checkpoint lies.
        step: of its state.
        event_kind: of the event that it is registered for.
        metrics, tags: by name.
    """

    source: str
    step: int
    event_kind: str
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])
    tags: Mapping[str, str] = field(default_factory=dict[str, str])


class Registry(Protocol):
    """Where versions are registered. Each call may block, and raises StorageError if it fails."""

    def add(self, version: Version) -> str:
        """Register one version; returns its number."""
        ...

    def has(self, source: str) -> bool:
        """Whether a version with this source is registered."""
        ...

    def close(self, status: str) -> None:
        """End the run that the metrics were logged to."""
        ...


class RegistryThread(WorkerThread):
    """Registers what it is told to, in that order.

    Args:
        owner: name of the subscriber.
        publish: ``EventBus.publish``.
        registry: where to.
        retries, retry_delay_s: as of ``retry``.
    """

    def __init__(
        self,
        owner: str,
        publish: Callable[[Event], None],
        registry: Registry,
        *,
        retries: int,
        retry_delay_s: float,
    ) -> None:
        super().__init__(owner, publish)
        self._owner = owner
        self._registry = registry
        self._retries = retries
        self._retry_delay_s = retry_delay_s
        self._waiting: list[Version] = []

    # --- any thread; never blocks -----------------------------------------------------------------------------

    def add(self, version: Version, unless_there: bool = False) -> None:
        """Have it registered; with ``unless_there`` only if no version has its source."""
        self._waiting.append(version)
        self.put(partial(self._register, version, unless_there))

    def end(self, status: str) -> None:
        """Have the run of MLflow's ended."""
        self.put(partial(self._end, status))

    @property
    def listing(self) -> str:
        """What is neither registered nor given up, for messages."""
        return (
            ", ".join(version.source for version in list(self._waiting))
            or "nothing, but its run was not ended"
        )

    # --- on the thread ----------------------------------------------------------------------------------------

    def _register(self, version: Version, unless_there: bool) -> None:
        registry = self._registry
        try:
            if unless_there and self._retried(lambda: registry.has(version.source)):
                logger.info("%s is registered already", version.source)
            else:
                number = self._retried(lambda: registry.add(version))
                logger.info("%s is version %s of the model", version.source, number)
        except StorageError as error:
            if self.stopping.is_set():
                return  # whoever set it says what is left
            self._say_failed(
                version.step, version.event_kind, f"{version.source} was not registered: {error}"
            )
        self._waiting.remove(version)

    def _end(self, status: str) -> None:
        try:
            self._registry.close(status)
        except StorageError as error:
            self._say_failed(0, "stop", f"the run of MLflow's was not ended: {error}")

    def _say_failed(self, step: int, event_kind: str, text: str) -> None:
        logger.error("%s", text)
        self.publish(SubscriberFailed(step=step, subscriber=self._owner, event_kind=event_kind, error=text))

    def _retried(self, action: Callable[[], T]) -> T:
        return retry(action, retries=self._retries, delay_s=self._retry_delay_s, stopping=self.stopping)
