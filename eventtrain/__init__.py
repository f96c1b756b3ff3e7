"""eventtrain: a jitted JAX step publishes typed events, async subscribers act on them, the loop never waits.

``import eventtrain as et``. Subscribers are in ``eventtrain.subscribers``, helpers for tests in ``eventtrain.testing``.
"""

import importlib as _importlib
import logging as _logging
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from eventtrain import errors
from eventtrain._version import __version__ as __version__
from eventtrain.bus.bus import EventBus
from eventtrain.bus.event_stream import EventStream
from eventtrain.bus.queues import DropNewest, DropOldest, KeepLatest, Lossless, Queue
from eventtrain.bus.step_series import StepSeries
from eventtrain.bus.subscription import Subscription, SubscriptionStatistics
from eventtrain.control.control import Control
from eventtrain.control.loop_statistics import LoopStatistics
from eventtrain.control.requests import TracedRun
from eventtrain.control.run_context import RunContext
from eventtrain.control.snapshots import KeptSnapshot
from eventtrain.data.array_loader import ArrayLoader
from eventtrain.device.compiled_step import StepProgram
from eventtrain.device.extensions import StepChange, StepExtension
from eventtrain.device.hyperparams import Hyperparams, hyperparams, nonfinite_metrics
from eventtrain.device.norms import UpdateNorms, norms
from eventtrain.device.reductions import Last, Max, Mean, Sum
from eventtrain.device.state import StateArray
from eventtrain.device.weight_averaging import EMA, SWA
from eventtrain.errors import *  # noqa: F403
from eventtrain.events import AnyEvent, Event, events_json_schema, parse_event
from eventtrain.events import catalog as _catalog
from eventtrain.events.catalog import *  # noqa: F403
from eventtrain.events.commands import AnyCommand, Cause, Command
from eventtrain.events.models import Column
from eventtrain.subscribers._shared.log_filter import PrintableLog as _PrintableLog
from eventtrain.subscribers.base import Subscriber
from eventtrain.trainer.fit_result import FitResult
from eventtrain.trainer.session import Session
from eventtrain.trainer.trainer import Trainer

if _TYPE_CHECKING:
    from eventtrain.config.load import load_subscribers
    from eventtrain.config.subscriber_config import subscriber_config
    from eventtrain.runs.reading import EventReader, read_events
    from eventtrain.subscribers.checkpointing.matching import take_matching
    from eventtrain.subscribers.checkpointing.reader import load_state
    from eventtrain.trainer.replay import replay

__all__ = [
    "EMA",
    "SWA",
    "AnyCommand",
    "AnyEvent",
    "ArrayLoader",
    "Cause",
    "Column",
    "Command",
    "Control",
    "DropNewest",
    "DropOldest",
    "Event",
    "EventBus",
    "EventReader",
    "EventStream",
    "FitResult",
    "Hyperparams",
    "KeepLatest",
    "KeptSnapshot",
    "Last",
    "LoopStatistics",
    "Lossless",
    "Max",
    "Mean",
    "Queue",
    "RunContext",
    "Session",
    "StateArray",
    "StepChange",
    "StepExtension",
    "StepProgram",
    "StepSeries",
    "Subscriber",
    "Subscription",
    "SubscriptionStatistics",
    "Sum",
    "TracedRun",
    "Trainer",
    "UpdateNorms",
    "errors",
    "events_json_schema",
    "hyperparams",
    "load_state",
    "load_subscribers",
    "nonfinite_metrics",
    "norms",
    "parse_event",
    "read_events",
    "replay",
    "subscriber_config",
    "take_matching",
]
__all__ += errors.__all__
__all__.remove("CommandRejected")  # the alias of an exception; here it is the event
__all__.remove("PeerLost")  # the exception; here it is the event
__all__ += _catalog.__all__

_logging.getLogger("eventtrain").addFilter(_PrintableLog())

_LAZY = {  # rarely needed, or slow to import, as Orbax is
    "EventReader": "eventtrain.runs.reading",
    "load_state": "eventtrain.subscribers.checkpointing.reader",
    "load_subscribers": "eventtrain.config.load",
    "read_events": "eventtrain.runs.reading",
    "replay": "eventtrain.trainer.replay",
    "subscriber_config": "eventtrain.config.subscriber_config",
    "take_matching": "eventtrain.subscribers.checkpointing.matching",
}


def __getattr__(name: str) -> _Any:
    if name in _LAZY:
        return getattr(_importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
