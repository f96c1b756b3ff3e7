"""Use of MLflow's client: failures without secrets, and names as MLflow takes them. Blocking; any thread.

MLflow's messages may quote its URI with passwords, so only the kind of a failure is passed on.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Generator
from contextlib import contextmanager

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from eventtrain.errors import StorageError

PERMANENT_ERRORS = frozenset(
    {
        "INVALID_PARAMETER_VALUE",
        "PERMISSION_DENIED",
        "UNAUTHENTICATED",
        "ENDPOINT_NOT_FOUND",
        "FEATURE_DISABLED",
    }
)
"""MLflow's error codes after which another attempt would fail too."""
KEY_LIMIT = 250
"""Characters of a key."""


@contextmanager
def without_text() -> Generator[None]:
    """Turns an error of MLflow into a StorageError that quotes nothing of it."""
    try:
        yield
    except ImportError as error:  # for example the driver of a database
        raise StorageError(f"MLflow cannot be used: {error}") from None
    except MlflowException as error:
        code = str(error.error_code)
        raise StorageError(f"MLflow failed: {code}", may_pass=code not in PERMANENT_ERRORS) from None
    except Exception as error:
        raise StorageError(f"MLflow failed: {type(error).__name__}", may_pass=True) from None


def experiment_id(client: MlflowClient, name: str) -> str:
    """Returns the id of the experiment of this name; creates it if missing."""
    try:
        found = client.get_experiment_by_name(name)
        return found.experiment_id if found else client.create_experiment(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        found = client.get_experiment_by_name(name)  # another process was faster
        if found is None:
            raise
        return found.experiment_id


def key_for(name: str) -> str:
    """Returns ``name`` as a key for metrics, params and tags: word characters, ``-. :``, and ``/`` between parts."""
    parts = (part.strip(".") for part in re.sub(r"[^\w\-. :/]", "_", name).split("/"))
    return "/".join(part for part in parts if part)[:KEY_LIMIT].rstrip("/.") or "_"


class Keys:
    """Maps each name to a key that no other name has."""

    def __init__(self) -> None:
        self._keys: dict[str, str] = {}
        self._taken: set[str] = set()

    def __getitem__(self, name: str) -> str:
        if name not in self._keys:
            key = key_for(name)
            if key in self._taken:  # for example "a(1)" and "a_1_"
                digest = hashlib.sha256(name.encode("utf-8", "backslashreplace")).hexdigest()[:8]
                key = f"{key[: KEY_LIMIT - 9]}-{digest}"
            self._keys[name] = key
            self._taken.add(key)
        return self._keys[name]
