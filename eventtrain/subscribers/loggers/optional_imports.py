"""Packages that one feature of several needs: imported when that feature is used, and named when they are missing."""

from __future__ import annotations

import importlib
from types import ModuleType

from eventtrain.errors import ConfigurationError

_NEEDED = {"pandas": "History.to_dataframe() needs pandas. Install it: pip install 'eventtrain[dataframe]'."}


def __getattr__(name: str) -> ModuleType:
    if name not in _NEEDED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ConfigurationError(_NEEDED[name]) from error
