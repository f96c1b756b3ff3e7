"""How MLflow is spoken to: its failures without its secrets, and names as it takes them. Blocking; any thread.

What MLflow says of a failure may quote its URI, passwords included, so only the kind of a failure is passed on.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Generator
from contextlib import contextmanager

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from eventtrain.errors import StorageError

HOPELESS = frozenset(
    {
        "INVALID_PARAMETER_VALUE",
        "PERMISSION_DENIED",
        "UNAUTHENTICATED",
        "ENDPOINT_NOT_FOUND",
        "FEATURE_DISABLED",
    }
)
"""MLflow's error codes that will be the same the next time."""
KEY_LIMIT = 250
"""Characters of a key."""


@contextmanager
def told() -> Generator[None]:
    """Turns what MLflow raises into a StorageError that quotes nothing of it."""
    try:
        yield
    except ImportError as error:  # the driver of a database, say
        raise StorageError(f"MLflow cannot be used: {error}") from None
    except MlflowException as error:
        code = str(error.error_code)
        raise StorageError(f"MLflow says {code}", may_pass=code not in HOPELESS) from None
    except Exception as error:
        raise StorageError(f"MLflow failed: {type(error).__name__}", may_pass=True) from None


def experiment_id(client: MlflowClient, name: str) -> str:
    """Of the experiment of this name; made if it is not there."""
    try:
        found = client.get_experiment_by_name(name)
        return found.experiment_id if found else client.create_experiment(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":  # somebody else was faster
            raise
        found = client.get_experiment_by_name(name)
        if found is None:
            raise
        return found.experiment_id


def key_for(name: str) -> str:
    """``name`` as MLflow takes keys of metrics, params and tags: word characters, ``-. :``, and ``/`` between parts."""
    parts = (part.strip(".") for part in re.sub(r"[^\w\-. :/]", "_", name).split("/"))
    return "/".join(part for part in parts if part)[:KEY_LIMIT].rstrip("/.") or "_"


class Keys:
    """Gives each name a key of its own."""

    def __init__(self) -> None:
        self._keys: dict[str, str] = {}
        self._taken: set[str] = set()

    def __getitem__(self, name: str) -> str:
        if name not in self._keys:
            key = key_for(name)
            if key in self._taken:  # "a(1)" and "a_1_", say
                digest = hashlib.sha256(name.encode("utf-8", "backslashreplace")).hexdigest()[:8]
                key = f"{key[: KEY_LIMIT - 9]}-{digest}"
            self._keys[name] = key
            self._taken.add(key)
        return self._keys[name]
