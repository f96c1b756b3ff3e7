"""``Channel``: the key-value store of ``jax.distributed``. The one module that touches JAX's private client of it."""

from __future__ import annotations

from typing import Any

import jax

from eventtrain.errors import ConfigurationError

try:
    from jax._src import distributed
except ImportError:  # a later version of JAX may have it elsewhere
    distributed = None

METHODS = (
    "blocking_key_value_get",
    "key_value_delete",
    "key_value_dir_get",
    "key_value_increment",
    "key_value_set",
)
"""Methods of the client that are used: in jaxlib 0.7.2 to 0.12."""


class Channel:
    """Keys and values that all processes of ``jax.distributed`` share, below one prefix. Any thread; calls block.

    A call takes 0.1 to 0.3 ms, and releases the GIL.

    Args:
        client: JAX's client of the coordination service.
        prefix: of all keys.
    """

    def __init__(self, client: Any, prefix: str) -> None:
        self._client = client
        self._prefix = prefix

    def below(self, name: str) -> Channel:
        """Returns the channel whose keys begin with ``name`` and a slash."""
        return Channel(self._client, f"{self._prefix}{name}/")

    def set(self, key: str, value: str, *, overwrite: bool = False) -> None:
        """Sets a key."""
        self._client.key_value_set(self._prefix + key, value, allow_overwrite=overwrite)

    def wait_for(self, key: str, timeout_s: float) -> str | None:
        """Returns the value of a key, once it has one; None after ``timeout_s`` seconds."""
        try:
            return self._client.blocking_key_value_get(self._prefix + key, int(timeout_s * 1000))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" in str(error):
                return None
            raise

    def all(self) -> dict[str, str]:
        """Returns every key of this channel that has a value, with it."""
        found = self._client.key_value_dir_get(self._prefix)
        return {key.removeprefix(self._prefix).lstrip("/"): value for key, value in found}

    def increment(self, key: str) -> int:
        """Adds 1 to the number of this key, and returns it: the first call returns 1."""
        return self._client.key_value_increment(self._prefix + key, 1)

    def delete(self, key: str) -> None:
        """Deletes a key, or all that begin with it and a slash."""
        self._client.key_value_delete(self._prefix + key)


def coordinator_host() -> str | None:
    """Returns the host at which the coordination service of process 0 is reached; None if that is unknown."""
    address: str | None = getattr(getattr(distributed, "global_state", None), "coordinator_address", None)
    return address and address.rpartition(":")[0].strip("[]")


def open_channel() -> Channel:
    """Returns the channel of this process.

    Raises:
        ConfigurationError: ``jax.distributed.initialize()`` was not called, or this version of JAX has another client.
    """
    client: Any = getattr(getattr(distributed, "global_state", None), "client", None)
    if client is None:
        raise ConfigurationError(
            "This is one of several JAX processes, and JAX has no client of its coordination service here. Call "
            "jax.distributed.initialize() before the trainer is made."
        )
    missing = [name for name in METHODS if not hasattr(client, name)]
    if missing:
        raise ConfigurationError(
            f"jax {jax.__version__} has a client of the coordination service without {', '.join(missing)}, which "
            "eventtrain needs to train in several processes. Use another version of jax, or one process."
        )
    return Channel(client, "eventtrain/")
