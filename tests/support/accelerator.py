"""A CPU that is taken for an accelerator: its arrays are on the host only in pinned host memory."""

from __future__ import annotations

import pytest

from eventtrain.device import pinned_memory


def as_on_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinned_memory, "is_on_host", lambda leaf: leaf.sharding.memory_kind == "pinned_host")
