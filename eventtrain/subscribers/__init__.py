"""The subscribers that come with eventtrain. Each is imported when it is first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eventtrain.subscribers.alerts.alerts import Alerts as Alerts
    from eventtrain.subscribers.alerts.event_rules import CheckpointFailedRule as CheckpointFailedRule
    from eventtrain.subscribers.alerts.event_rules import RunCompletedRule as RunCompletedRule
    from eventtrain.subscribers.alerts.event_rules import RunFailedRule as RunFailedRule
    from eventtrain.subscribers.alerts.metric_rules import ForecastRule as ForecastRule
    from eventtrain.subscribers.alerts.metric_rules import NoImprovementRule as NoImprovementRule
    from eventtrain.subscribers.alerts.metric_rules import Rule as Rule
    from eventtrain.subscribers.alerts.metric_rules import SpikeRule as SpikeRule
    from eventtrain.subscribers.alerts.target import AlertTarget as AlertTarget
    from eventtrain.subscribers.alerts.timed_rules import DeadlineRule as DeadlineRule
    from eventtrain.subscribers.alerts.timed_rules import LowDiskRule as LowDiskRule
    from eventtrain.subscribers.alerts.timed_rules import SlowSubscriberRule as SlowSubscriberRule
    from eventtrain.subscribers.alerts.timed_rules import StallRule as StallRule
    from eventtrain.subscribers.brokers.nats_events import NATSEvents as NATSEvents
    from eventtrain.subscribers.brokers.redis_events import RedisEvents as RedisEvents
    from eventtrain.subscribers.checkpointing.checkpointer import Checkpointer as Checkpointer
    from eventtrain.subscribers.checkpointing.checkpointer import restore_state as restore_state
    from eventtrain.subscribers.dashboard.dashboard import Dashboard as Dashboard
    from eventtrain.subscribers.loggers.csv_logger import CSVLogger as CSVLogger
    from eventtrain.subscribers.loggers.history import History as History
    from eventtrain.subscribers.loggers.jsonl_logger import JSONLLogger as JSONLLogger
    from eventtrain.subscribers.loggers.parquet_logger import ParquetLogger as ParquetLogger
    from eventtrain.subscribers.monitoring.device_stats import DeviceStats as DeviceStats
    from eventtrain.subscribers.monitoring.overhead_meter import OverheadMeter as OverheadMeter
    from eventtrain.subscribers.monitoring.profiler import Profiler as Profiler
    from eventtrain.subscribers.monitoring.sample import Sample as Sample
    from eventtrain.subscribers.monitoring.step_timer import StepTimer as StepTimer
    from eventtrain.subscribers.monitoring.summary import Summary as Summary
    from eventtrain.subscribers.policies.command_replay import CommandReplay as CommandReplay
    from eventtrain.subscribers.policies.early_stopping import EarlyStopping as EarlyStopping
    from eventtrain.subscribers.policies.evaluate_every import EvaluateEvery as EvaluateEvery
    from eventtrain.subscribers.policies.gradient_spike import GradientSpike as GradientSpike
    from eventtrain.subscribers.policies.lambda_subscriber import Lambda as Lambda
    from eventtrain.subscribers.policies.lr_finder import LRFinder as LRFinder
    from eventtrain.subscribers.policies.max_time import MaxTime as MaxTime
    from eventtrain.subscribers.policies.reduce_lr_on_plateau import ReduceLROnPlateau as ReduceLROnPlateau
    from eventtrain.subscribers.policies.scheduler import HyperparamScheduler as HyperparamScheduler
    from eventtrain.subscribers.policies.scheduler import LearningRateScheduler as LearningRateScheduler
    from eventtrain.subscribers.policies.terminate_on_nan import TerminateOnNaN as TerminateOnNaN
    from eventtrain.subscribers.progress.progress_bar import ProgressBar as ProgressBar
    from eventtrain.subscribers.remote.download import download_checkpoint as download_checkpoint
    from eventtrain.subscribers.remote.uploader import Uploader as Uploader
    from eventtrain.subscribers.reports.plot_curves import PlotCurves as PlotCurves
    from eventtrain.subscribers.reports.report import Report as Report
    from eventtrain.subscribers.trackers.mlflow_logger import MLflowLogger as MLflowLogger
    from eventtrain.subscribers.trackers.model_registry import ModelRegistry as ModelRegistry
    from eventtrain.subscribers.trackers.opentelemetry import OpenTelemetry as OpenTelemetry
    from eventtrain.subscribers.trackers.prometheus_exporter import PrometheusExporter as PrometheusExporter
    from eventtrain.subscribers.trackers.tensorboard_logger import TensorBoardLogger as TensorBoardLogger
    from eventtrain.subscribers.trackers.trackio_logger import TrackioLogger as TrackioLogger
    from eventtrain.subscribers.trackers.wandb_logger import WandbLogger as WandbLogger

_LAZY = {
    "AlertTarget": "eventtrain.subscribers.alerts.target",
    "Alerts": "eventtrain.subscribers.alerts.alerts",
    "CSVLogger": "eventtrain.subscribers.loggers.csv_logger",
    "CheckpointFailedRule": "eventtrain.subscribers.alerts.event_rules",
    "Checkpointer": "eventtrain.subscribers.checkpointing.checkpointer",
    "CommandReplay": "eventtrain.subscribers.policies.command_replay",
    "Dashboard": "eventtrain.subscribers.dashboard.dashboard",
    "DeadlineRule": "eventtrain.subscribers.alerts.timed_rules",
    "DeviceStats": "eventtrain.subscribers.monitoring.device_stats",
    "EarlyStopping": "eventtrain.subscribers.policies.early_stopping",
    "EvaluateEvery": "eventtrain.subscribers.policies.evaluate_every",
    "ForecastRule": "eventtrain.subscribers.alerts.metric_rules",
    "GradientSpike": "eventtrain.subscribers.policies.gradient_spike",
    "History": "eventtrain.subscribers.loggers.history",
    "HyperparamScheduler": "eventtrain.subscribers.policies.scheduler",
    "JSONLLogger": "eventtrain.subscribers.loggers.jsonl_logger",
    "LRFinder": "eventtrain.subscribers.policies.lr_finder",
    "Lambda": "eventtrain.subscribers.policies.lambda_subscriber",
    "LearningRateScheduler": "eventtrain.subscribers.policies.scheduler",
    "LowDiskRule": "eventtrain.subscribers.alerts.timed_rules",
    "MLflowLogger": "eventtrain.subscribers.trackers.mlflow_logger",
    "MaxTime": "eventtrain.subscribers.policies.max_time",
    "ModelRegistry": "eventtrain.subscribers.trackers.model_registry",
    "NATSEvents": "eventtrain.subscribers.brokers.nats_events",
    "NoImprovementRule": "eventtrain.subscribers.alerts.metric_rules",
    "OpenTelemetry": "eventtrain.subscribers.trackers.opentelemetry",
    "OverheadMeter": "eventtrain.subscribers.monitoring.overhead_meter",
    "ParquetLogger": "eventtrain.subscribers.loggers.parquet_logger",
    "PlotCurves": "eventtrain.subscribers.reports.plot_curves",
    "Profiler": "eventtrain.subscribers.monitoring.profiler",
    "ProgressBar": "eventtrain.subscribers.progress.progress_bar",
    "PrometheusExporter": "eventtrain.subscribers.trackers.prometheus_exporter",
    "ReduceLROnPlateau": "eventtrain.subscribers.policies.reduce_lr_on_plateau",
    "RedisEvents": "eventtrain.subscribers.brokers.redis_events",
    "Report": "eventtrain.subscribers.reports.report",
    "Rule": "eventtrain.subscribers.alerts.metric_rules",
    "RunCompletedRule": "eventtrain.subscribers.alerts.event_rules",
    "RunFailedRule": "eventtrain.subscribers.alerts.event_rules",
    "Sample": "eventtrain.subscribers.monitoring.sample",
    "SlowSubscriberRule": "eventtrain.subscribers.alerts.timed_rules",
    "SpikeRule": "eventtrain.subscribers.alerts.metric_rules",
    "StallRule": "eventtrain.subscribers.alerts.timed_rules",
    "StepTimer": "eventtrain.subscribers.monitoring.step_timer",
    "Summary": "eventtrain.subscribers.monitoring.summary",
    "TensorBoardLogger": "eventtrain.subscribers.trackers.tensorboard_logger",
    "TerminateOnNaN": "eventtrain.subscribers.policies.terminate_on_nan",
    "Uploader": "eventtrain.subscribers.remote.uploader",
    "TrackioLogger": "eventtrain.subscribers.trackers.trackio_logger",
    "WandbLogger": "eventtrain.subscribers.trackers.wandb_logger",
    "download_checkpoint": "eventtrain.subscribers.remote.download",
    "restore_state": "eventtrain.subscribers.checkpointing.checkpointer",
}
__all__ = sorted(_LAZY)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
