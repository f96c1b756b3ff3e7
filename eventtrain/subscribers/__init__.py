"""The subscribers that come with eventtrain. Each is imported when it is first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eventtrain.subscribers.alerts.alerts import Alerts
    from eventtrain.subscribers.alerts.event_rules import (
        CheckpointFailedRule,
        RunCompletedRule,
        RunFailedRule,
    )
    from eventtrain.subscribers.alerts.metric_rules import ForecastRule, NoImprovementRule, Rule, SpikeRule
    from eventtrain.subscribers.alerts.target import AlertTarget
    from eventtrain.subscribers.alerts.timed_rules import (
        DeadlineRule,
        LowDiskRule,
        SlowSubscriberRule,
        StallRule,
    )
    from eventtrain.subscribers.checkpointing.checkpointer import Checkpointer, restore_state
    from eventtrain.subscribers.loggers.csv_logger import CSVLogger
    from eventtrain.subscribers.loggers.history import History
    from eventtrain.subscribers.loggers.jsonl_logger import JSONLLogger
    from eventtrain.subscribers.loggers.parquet_logger import ParquetLogger
    from eventtrain.subscribers.monitoring.device_stats import DeviceStats
    from eventtrain.subscribers.monitoring.overhead_meter import OverheadMeter
    from eventtrain.subscribers.monitoring.profiler import Profiler
    from eventtrain.subscribers.monitoring.step_timer import StepTimer
    from eventtrain.subscribers.policies.early_stopping import EarlyStopping
    from eventtrain.subscribers.policies.evaluate_every import EvaluateEvery
    from eventtrain.subscribers.policies.gradient_spike import GradientSpike
    from eventtrain.subscribers.policies.lambda_subscriber import Lambda
    from eventtrain.subscribers.policies.lr_finder import LRFinder
    from eventtrain.subscribers.policies.max_time import MaxTime
    from eventtrain.subscribers.policies.reduce_lr_on_plateau import ReduceLROnPlateau
    from eventtrain.subscribers.policies.scheduler import HyperparamScheduler, LearningRateScheduler
    from eventtrain.subscribers.policies.terminate_on_nan import TerminateOnNaN
    from eventtrain.subscribers.progress.progress_bar import ProgressBar
    from eventtrain.subscribers.remote.download import download_checkpoint
    from eventtrain.subscribers.remote.uploader import Uploader
    from eventtrain.subscribers.reports.plot_curves import PlotCurves
    from eventtrain.subscribers.reports.report import Report
    from eventtrain.subscribers.trackers.mlflow_logger import MLflowLogger
    from eventtrain.subscribers.trackers.model_registry import ModelRegistry
    from eventtrain.subscribers.trackers.opentelemetry import OpenTelemetry
    from eventtrain.subscribers.trackers.prometheus_exporter import PrometheusExporter
    from eventtrain.subscribers.trackers.tensorboard_logger import TensorBoardLogger
    from eventtrain.subscribers.trackers.wandb_logger import WandbLogger

__all__ = [
    "AlertTarget",
    "Alerts",
    "CSVLogger",
    "CheckpointFailedRule",
    "Checkpointer",
    "DeadlineRule",
    "DeviceStats",
    "EarlyStopping",
    "EvaluateEvery",
    "ForecastRule",
    "GradientSpike",
    "History",
    "HyperparamScheduler",
    "JSONLLogger",
    "LRFinder",
    "Lambda",
    "LearningRateScheduler",
    "LowDiskRule",
    "MLflowLogger",
    "MaxTime",
    "ModelRegistry",
    "NoImprovementRule",
    "OpenTelemetry",
    "OverheadMeter",
    "ParquetLogger",
    "PlotCurves",
    "Profiler",
    "ProgressBar",
    "PrometheusExporter",
    "ReduceLROnPlateau",
    "Report",
    "Rule",
    "RunCompletedRule",
    "RunFailedRule",
    "SlowSubscriberRule",
    "SpikeRule",
    "StallRule",
    "StepTimer",
    "TensorBoardLogger",
    "TerminateOnNaN",
    "Uploader",
    "WandbLogger",
    "download_checkpoint",
    "restore_state",
]

_LAZY = {
    "AlertTarget": "eventtrain.subscribers.alerts.target",
    "Alerts": "eventtrain.subscribers.alerts.alerts",
    "CSVLogger": "eventtrain.subscribers.loggers.csv_logger",
    "CheckpointFailedRule": "eventtrain.subscribers.alerts.event_rules",
    "Checkpointer": "eventtrain.subscribers.checkpointing.checkpointer",
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
    "NoImprovementRule": "eventtrain.subscribers.alerts.metric_rules",
    "OpenTelemetry": "eventtrain.subscribers.trackers.opentelemetry",
    "OverheadMeter": "eventtrain.subscribers.monitoring.overhead_meter",
    "ParquetLogger": "eventtrain.subscribers.loggers.parquet_logger",
    "PlotCurves": "eventtrain.subscribers.reports.plot_curves",
    "Profiler": "eventtrain.subscribers.monitoring.profiler",
    "ProgressBar": "eventtrain.subscribers.progress.progress_bar",
    "PrometheusExporter": "eventtrain.subscribers.trackers.prometheus_exporter",
    "ReduceLROnPlateau": "eventtrain.subscribers.policies.reduce_lr_on_plateau",
    "Report": "eventtrain.subscribers.reports.report",
    "Rule": "eventtrain.subscribers.alerts.metric_rules",
    "RunCompletedRule": "eventtrain.subscribers.alerts.event_rules",
    "RunFailedRule": "eventtrain.subscribers.alerts.event_rules",
    "SlowSubscriberRule": "eventtrain.subscribers.alerts.timed_rules",
    "SpikeRule": "eventtrain.subscribers.alerts.metric_rules",
    "StallRule": "eventtrain.subscribers.alerts.timed_rules",
    "StepTimer": "eventtrain.subscribers.monitoring.step_timer",
    "TensorBoardLogger": "eventtrain.subscribers.trackers.tensorboard_logger",
    "TerminateOnNaN": "eventtrain.subscribers.policies.terminate_on_nan",
    "Uploader": "eventtrain.subscribers.remote.uploader",
    "WandbLogger": "eventtrain.subscribers.trackers.wandb_logger",
    "download_checkpoint": "eventtrain.subscribers.remote.download",
    "restore_state": "eventtrain.subscribers.checkpointing.checkpointer",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
