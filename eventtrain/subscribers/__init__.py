"""What eventtrain brings along to watch and steer a run.

Checkpointing is loaded when it is first asked for: Orbax alone takes most of a second to import.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from eventtrain.progress import ProgressBar
from eventtrain.subscribers.alerts import Alerts, Rule
from eventtrain.subscribers.early_stopping import EarlyStopping
from eventtrain.subscribers.jsonl_logger import JSONLLogger
from eventtrain.subscribers.reduce_lr_on_plateau import ReduceLROnPlateau

if TYPE_CHECKING:
    from eventtrain.subscribers.checkpointer import Checkpointer, restore_state

__all__ = [
    "Alerts",
    "Checkpointer",
    "EarlyStopping",
    "JSONLLogger",
    "ProgressBar",
    "ReduceLROnPlateau",
    "Rule",
    "restore_state",
]

_LAZY = {"Checkpointer": "checkpointer", "restore_state": "checkpointer"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"eventtrain.subscribers.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
