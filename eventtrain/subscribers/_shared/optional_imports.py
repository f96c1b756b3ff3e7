"""Imports of packages that only some features need; an error for a missing one names the extra to install."""

from __future__ import annotations

import importlib
from typing import Any, NoReturn

from eventtrain.errors import ConfigurationError


def import_optional(module: str, *, extra: str, used_by: str) -> Any:
    """Returns ``module``, or a placeholder if a package that it needs is not installed.

    Args:
        module: full dotted name, written out at the call so that it can be checked.
        extra: of eventtrain, that installs the package.
        used_by: the feature, for the message.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        return MissingModule(error, extra, used_by)


def require_installed(module: Any) -> None:
    """Raises ConfigurationError if ``module``, as ``import_optional`` returned it, could not be imported."""
    if isinstance(module, MissingModule):
        module.refuse()


class MissingModule:
    """Placeholder for a module that could not be imported: using it raises ConfigurationError with the cause."""

    def __init__(self, error: ImportError, extra: str, used_by: str) -> None:
        self._error = error
        self._text = (
            f"{used_by} requires a package that cannot be imported ({error}). "
            f"Install it: pip install 'eventtrain[{extra}]'."
        )

    def refuse(self) -> NoReturn:
        """Raises the ConfigurationError."""
        raise ConfigurationError(self._text) from self._error

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # what inspect and doctest look for
            raise AttributeError(name)
        self.refuse()
