"""A stand-in for JAX's client of its coordination service, in the memory of one process."""

from __future__ import annotations

import threading

import jax


class KeyValues:
    """The methods that ``loop/agreement/channel.py`` uses. Any thread."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.most = 0
        """The largest number of keys that there was."""
        self._changed = threading.Condition()

    def key_value_set(self, key: str, value: str, *, allow_overwrite: bool = False) -> None:
        with self._changed:
            if key in self.values and not allow_overwrite:
                raise jax.errors.JaxRuntimeError(f"ALREADY_EXISTS: key {key} already exists.")
            self.values[key] = value
            self.most = max(self.most, len(self.values))
            self._changed.notify_all()

    def blocking_key_value_get(self, key: str, timeout_in_ms: int) -> str:
        with self._changed:
            if not self._changed.wait_for(lambda: key in self.values, timeout_in_ms / 1000):
                raise jax.errors.JaxRuntimeError(f"DEADLINE_EXCEEDED: {key}")
            return self.values[key]

    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]:
        with self._changed:
            return [(name, value) for name, value in self.values.items() if name.startswith(key)]

    def key_value_increment(self, key: str, increment: int) -> int:
        with self._changed:
            number = int(self.values.get(key, "0")) + increment
            self.values[key] = str(number)
            return number

    def key_value_delete(self, key: str) -> None:
        with self._changed:
            for name in [name for name in self.values if name == key or name.startswith(f"{key}/")]:
                del self.values[name]
