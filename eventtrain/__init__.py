"""eventtrain: a jitted JAX training step publishes typed events, async subscribers act on them, the loop never waits.

``import eventtrain as et``; the subscribers stand in ``eventtrain.subscribers``, what tests need in ``eventtrain.testing``.
"""

from importlib.metadata import version as _version

from eventtrain import errors
from eventtrain.bus.bus import EventBus
from eventtrain.bus.queues import DropNewest, DropOldest, KeepLatest, Lossless, Queue
from eventtrain.bus.subscription import Subscription, SubscriptionStatistics
from eventtrain.commands import Cause, Command
from eventtrain.control import Control, KeptSnapshot
from eventtrain.data import ArrayLoader
from eventtrain.device.extensions import EMA, StepExtension
from eventtrain.errors import (
    AlreadyRunning,
    AmbiguousHyperparam,
    BusClosed,
    BusError,
    ConfigurationError,
    DataError,
    EventParseError,
    EventReused,
    EventTrainError,
    HyperparamError,
    MetricsError,
    QueueFull,
    ScheduledHyperparam,
    SnapshotError,
    StateError,
    StateInUse,
    StepError,
    SubscriberError,
    UnknownHyperparam,
)
from eventtrain.events import (
    AlertRaised,
    AlertResolved,
    CheckpointCommitted,
    CheckpointFailed,
    CheckpointRestored,
    CheckpointStarted,
    CommandApplied,
    CommandConflict,
    CommandRejected,
    EpochCompleted,
    EpochStarted,
    EvalCompleted,
    EvalStarted,
    EvalStepCompleted,
    Event,
    HyperparamChanged,
    LoopStalled,
    PredictCompleted,
    PredictStarted,
    PredictStepCompleted,
    RunCompleted,
    RunFailed,
    RunStarted,
    SnapshotTaken,
    StepCompleted,
    StepsCompleted,
    StepStarted,
    SubscriberDisabled,
    SubscriberFailed,
    SubscriberLagged,
    events_json_schema,
    parse_event,
)
from eventtrain.session import Session
from eventtrain.subscriber import RunContext, Subscriber
from eventtrain.trainer import FitResult, Trainer

__version__ = _version("eventtrain")

__all__ = [name for name in dir() if not name.startswith("_")]
