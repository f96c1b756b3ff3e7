"""``Sample``: what the model makes from its state while it trains: texts, images, arrays and tables."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from functools import partial
from io import BytesIO
from typing import Any

import numpy as np

from eventtrain.errors import ConfigurationError
from eventtrain.events import RunStarted, SampleTaken, SubscriberFailed
from eventtrain.events.samples import Media
from eventtrain.subscribers._shared.images import is_image, pixels, png
from eventtrain.subscribers._shared.worker_thread import WorkerThread
from eventtrain.subscribers.base import RunContext, Subscriber
from eventtrain.validation.annotations import checked
from eventtrain.validation.arguments import require_count
from eventtrain.validation.callables import require_plain

logger = logging.getLogger("eventtrain")

MOST_WAITING = 8
"""Samples that may wait to be read; each holds its arrays on the device. Further ones are left out."""
FINISH_S = 60.0
"""How long the end of a run waits for samples, within the trainer's ``drain_timeout_s``."""


class Sample(Subscriber):
    """Has the model make a sample, and publishes it as ``SampleTaken``.

    Args:
        fn: ``state -> array``, or a dict or another pytree of arrays. Compiled before the first step, and dispatched
            between two steps on the state of exactly that boundary, with the weights for predictions. It must be pure.
        every, every_epochs: steps and epochs between two samples; None: none.
        name: of the sample, for ``control.sample(name)``, which works without a schedule too.
        decode: makes the value from what fn returned, as NumPy arrays: text from token ids, for example. It runs in a
            thread of this subscriber, so it may be slow, and must not use JAX. None: as it is.
        media: "text", "image", "array" or "table". None: a str is text; bytes (a PNG file), a figure of matplotlib, and
            uint8[height, width] or uint8[height, width, 1, 3 or 4] are an image; a dict of columns is a table; other
            arrays stay arrays. With "image", floats from 0 to 1 are one, too.

    No step waits: neither for fn nor for the transfer. The device computes fn between two steps, so the next one
    begins later by its time there. A sample that cannot be made is reported by SubscriberFailed, and training
    continues; one that cannot be traced fails the run before its first step. While eight samples wait to be read,
    further ones are left out.

    In a run of several processes each of them computes fn, at the same boundary, and process 0 publishes the sample.

    Raises:
        ConfigurationError: an argument is invalid.
    """

    per_host = True

    @checked
    def __init__(
        self,
        fn: Callable[[Any], Any],
        *,
        every: int | None = None,
        every_epochs: int | None = None,
        name: str = "sample",
        decode: Callable[[Any], Any] | None = None,
        media: Media | None = None,
    ) -> None:
        require_count("Sample", "every", every, at_least=1, optional=True)
        require_count("Sample", "every_epochs", every_epochs, at_least=1, optional=True)
        if not 0 < len(name) <= 100:
            raise ConfigurationError(f"Sample(name={name[:50]!r}): name must have 1 to 100 characters.")
        for argument, function in (("fn", fn), ("decode", decode)):
            if function is not None:
                require_plain(f"Sample({argument}=...): {argument}", function)
        self._function = fn
        self._plan = {"every": every, "every_epochs": every_epochs}
        self._sample = name
        self._decode = decode
        self._media: Media | None = media
        self._thread: WorkerThread | None = None
        self._waiting = threading.Semaphore(MOST_WAITING)
        self._run: RunContext | None = None

    async def start(self, run: RunContext) -> None:
        """Registers the boundaries with the loop."""
        owner = self.name or "Sample"
        run.schedule_samples(owner, self._sample, self._function, self._deliver, **self._plan)
        self._waiting = threading.Semaphore(MOST_WAITING)
        self._thread = WorkerThread(owner, run.publish)
        self._thread.start()

    async def on_run_started(self, event: RunStarted) -> None:
        """Does nothing: the loop follows the plan by itself, but every subscriber must handle an event."""

    async def finish(self) -> None:
        """Waits until all samples were published."""
        thread, self._thread = self._thread, None
        if thread is not None:
            await thread.finish_within(
                FINISH_S, lambda: logger.error("%s: samples were not read in time", thread.name)
            )

    def _deliver(self, step: int, read: Callable[[], Any]) -> bool:
        thread = self._thread
        if thread is None or not self._waiting.acquire(blocking=False):
            return False
        thread.put(partial(self._publish, thread, step, read))
        return True

    def _publish(self, thread: WorkerThread, step: int, read: Callable[[], Any]) -> None:
        """Reads the arrays, which waits for the device, and publishes the sample. In the thread."""
        try:
            made = read()
            media, value = _sorted(made if self._decode is None else self._decode(made), self._media)
            event = SampleTaken(step=step, name=self._sample, media=media, value=value)
        except Exception as error:
            text = f"the sample {self._sample!r} of step {step} failed: {type(error).__name__}: {error}"
            logger.error("%s", text)
            event = SubscriberFailed(
                step=step, subscriber=self.name or "Sample", event_kind="sample", error=text
            )
        finally:
            self._waiting.release()
        thread.publish(event)


def _sorted(value: Any, media: Media | None) -> tuple[Media, Any]:
    """Returns the media of a value, and the value for ``SampleTaken``."""
    if hasattr(value, "savefig"):
        buffer = BytesIO()
        value.savefig(buffer, format="png")
        value = buffer.getvalue()
    if isinstance(value, str):
        return media or "text", value
    if isinstance(value, bytes):
        return media or "image", value
    if isinstance(value, Mapping):
        return media or "table", value
    array = np.asarray(value)
    if media == "image" or (media is None and array.dtype == np.uint8 and is_image(array)):
        if not is_image(array):
            raise ValueError(
                f"an image is [height, width] or [height, width, 1, 3 or 4], got {array.dtype}{list(array.shape)}"
            )
        return "image", png(pixels(array))
    return media or "array", array
