"""What eventtrain brings along to watch and steer a run.

Checkpointing is loaded when it is first asked for: Orbax alone takes most of a second to import.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from eventtrain.progress import ProgressBar
from eventtrain.subscribers.alert_metric_rules import ForecastRule, NoImprovementRule, Rule, SpikeRule
from eventtrain.subscribers.alert_run_rules import (
    CheckpointFailedRule,
    DeadlineRule,
    LowDiskRule,
    RunCompletedRule,
    RunFailedRule,
    SlowSubscriberRule,
    StallRule,
)
from eventtrain.subscribers.alert_target import AlertTarget
from eventtrain.subscribers.csv_logger import CSVLogger
from eventtrain.subscribers.early_stopping import EarlyStopping
from eventtrain.subscribers.evaluate_every import EvaluateEvery
from eventtrain.subscribers.gradient_spike import GradientSpike
from eventtrain.subscribers.history import History
from eventtrain.subscribers.hyperparam_scheduler import HyperparamScheduler
from eventtrain.subscribers.jsonl_logger import JSONLLogger
from eventtrain.subscribers.lambda_handlers import Lambda
from eventtrain.subscribers.learning_rate_scheduler import LearningRateScheduler
from eventtrain.subscribers.lr_finder import LRFinder
from eventtrain.subscribers.max_time import MaxTime
from eventtrain.subscribers.overhead_meter import OverheadMeter
from eventtrain.subscribers.profiler import Profiler
from eventtrain.subscribers.reduce_lr_on_plateau import ReduceLROnPlateau
from eventtrain.subscribers.step_timer import StepTimer
from eventtrain.subscribers.terminate_on_nan import TerminateOnNaN

if TYPE_CHECKING:
    from eventtrain.subscribers.alerts import Alerts
    from eventtrain.subscribers.checkpointer import Checkpointer, restore_state
    from eventtrain.subscribers.device_stats import DeviceStats
    from eventtrain.subscribers.download import download_checkpoint
    from eventtrain.subscribers.mlflow_logger import MLflowLogger
    from eventtrain.subscribers.model_registry import ModelRegistry
    from eventtrain.subscribers.open_telemetry import OpenTelemetry
    from eventtrain.subscribers.parquet_logger import ParquetLogger
    from eventtrain.subscribers.plot_curves import PlotCurves
    from eventtrain.subscribers.prometheus_exporter import PrometheusExporter
    from eventtrain.subscribers.report import Report
    from eventtrain.subscribers.tensorboard_logger import TensorBoardLogger
    from eventtrain.subscribers.uploader import Uploader
    from eventtrain.subscribers.wandb_logger import WandbLogger

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
    "Alerts": "alerts",
    "Checkpointer": "checkpointer",
    "DeviceStats": "device_stats",
    "MLflowLogger": "mlflow_logger",
    "ModelRegistry": "model_registry",
    "OpenTelemetry": "open_telemetry",
    "ParquetLogger": "parquet_logger",
    "PlotCurves": "plot_curves",
    "PrometheusExporter": "prometheus_exporter",
    "Report": "report",
    "TensorBoardLogger": "tensorboard_logger",
    "Uploader": "uploader",
    "WandbLogger": "wandb_logger",
    "download_checkpoint": "download",
    "restore_state": "checkpointer",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"eventtrain.subscribers.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
