"""What is public is what these three modules export, and nothing changes there by accident."""

from __future__ import annotations

import eventtrain as et
from eventtrain import subscribers, testing

DESIGN = [
    "Trainer",
    "EventBus",
    "ArrayLoader",
    "EMA",
    "SWA",
    "nonfinite_metrics",
    "hyperparams",
    "Mean",
    "Sum",
    "Max",
    "Last",
    "Event",
    "Subscriber",
    "Subscription",
    "Control",
    "Command",
    "parse_event",
    "Lossless",
    "KeepLatest",
    "DropOldest",
    "DropNewest",
    "StateInUse",
    "QueueFull",
    "ConfigurationError",
    "RunStarted",
    "RunCompleted",
    "RunFailed",
    "EpochStarted",
    "EpochCompleted",
    "StepStarted",
    "StepCompleted",
    "StepsCompleted",
    "EvalStarted",
    "EvalStepCompleted",
    "EvalCompleted",
    "PredictStarted",
    "PredictStepCompleted",
    "PredictCompleted",
    "HyperparamChanged",
    "CommandApplied",
    "CommandRejected",
    "CommandConflict",
    "SnapshotTaken",
    "StagingLimited",
    "CheckpointStarted",
    "CheckpointCommitted",
    "CheckpointFailed",
    "CheckpointRestored",
    "SubscriberFailed",
    "SubscriberLagged",
    "SubscriberDisabled",
    "AlertRaised",
    "AlertResolved",
    "LoopStalled",
]


def test_every_name_of_the_design_is_exported():
    assert [name for name in DESIGN if name not in et.__all__] == []
    assert [name for name in et.__all__ if not hasattr(et, name)] == []
    assert len(et.__all__) == len(set(et.__all__))


def test_every_error_is_exported_but_the_alias_whose_name_is_an_event():
    assert {name for name in et.errors.__all__ if name not in et.__all__} == set()
    assert issubclass(et.CommandRejected, et.Event)
    assert issubclass(et.CommandRejectedError, et.EventTrainError)
    assert et.errors.CommandRejected is et.errors.CommandRejectedError is et.CommandRejectedError


def test_the_subscribers_stand_under_their_final_names():
    names = {"Checkpointer", "ReduceLROnPlateau", "EarlyStopping", "JSONLLogger", "ProgressBar", "Alerts"}
    names |= {
        "TerminateOnNaN",
        "GradientSpike",
        "MaxTime",
        "EvaluateEvery",
        "Lambda",
        "Uploader",
        "ModelRegistry",
    }
    assert names <= set(subscribers.__all__)
    assert all(issubclass(getattr(subscribers, name), et.Subscriber) for name in names)


def test_what_tests_need_is_exported():
    assert {"RecordingSubscriber", "ScriptedStep", "FakeClock"} <= set(testing.__all__)


def test_the_bus_and_its_subscriptions_show_only_what_is_for_users():
    def public(cls):
        return {name for name in dir(cls) if not name.startswith("_")}

    publishing = {"publish", "publish_async"}
    subscribing = {"subscribe", "on", "stream", "wait_for", "subscriptions", "statistics"}
    running = {"serve", "drain", "aclose", "running", "run_id"}
    assert public(et.EventBus) == publishing | subscribing | running
    assert public(et.Subscription) == {
        "name",
        "active",
        "cancel",
        "redeliver",
        "dead_letters",
        "statistics",
    }
