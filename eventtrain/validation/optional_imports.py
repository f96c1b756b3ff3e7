"""Imports of packages that only some features need; an error for a missing one names the extra to install."""

from __future__ import annotations

import importlib
import traceback
from typing import Any, NoReturn

from eventtrain.errors import ConfigurationError, first_lines


def import_optional(module: str, *, extra: str, used_by: str) -> Any:
    """Returns ``module``, or a placeholder if a package that it needs is not installed.

    Args:
        module: full dotted name, written out at the call so that it can be checked.
        extra: of eventtrain, that installs the package.
        used_by: the feature, for the message.
    """
    try:
        return importlib.import_module(module)
    except Exception as error:  # whatever an installed package raises that does not fit to the others
        return MissingModule(error, extra, used_by)


def require_installed(module: Any) -> None:
    """Raises ConfigurationError if ``module``, as ``import_optional`` returned it, could not be imported."""
    if isinstance(module, MissingModule):
        module.refuse()


class MissingModule:
    """Placeholder for a module that could not be imported: using it raises ConfigurationError with the cause."""

    def __init__(self, error: Exception, extra: str, used_by: str) -> None:
        self._error = error
        install = f"pip install 'eventtrain[{extra}]'"
        package, missing = _importer(error).partition(".")[0], getattr(error, "name", None)
        if package == "eventtrain" and isinstance(error, ImportError):
            what = (
                f"{missing}, which is not installed"
                if missing
                else f"a package that is not installed ({error})"
            )
            self._text = f"{used_by} requires {what}. Install it: {install}."
        else:
            broken = package if package != "eventtrain" else missing or "a package"
            self._text = (
                f"{used_by} requires {broken}, which is installed but cannot be imported: {type(error).__name__}: "
                f"{first_lines(str(error), 3)}. Install what it lacks, or everything again: "
                f"{install} --force-reinstall."
            )

    def refuse(self) -> NoReturn:
        """Raises the ConfigurationError."""
        raise ConfigurationError(self._text) from self._error

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # what inspect and doctest look for
            raise AttributeError(name)
        self.refuse()


def _importer(error: Exception) -> str:
    """Returns the name of the module in which the import failed."""
    importer = "eventtrain"
    for frame, _ in traceback.walk_tb(error.__traceback__):
        name = frame.f_globals.get("__name__", "")
        if name.partition(".")[0] != "importlib":
            importer = name
    return importer
