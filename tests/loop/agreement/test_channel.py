"""The one module that touches JAX's private client: what it needs is there, and says so where it is not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from jax._src.lib import _jax

from eventtrain import errors
from eventtrain.loop.agreement import channel


@pytest.mark.parametrize("name", channel.METHODS)
def test_the_client_of_this_version_of_jax_has_the_method(name):
    assert callable(getattr(_jax.DistributedRuntimeClient, name))


def test_without_initialize_the_error_names_it(monkeypatch):
    monkeypatch.setattr(channel, "distributed", SimpleNamespace(global_state=SimpleNamespace(client=None)))
    with pytest.raises(errors.ConfigurationError, match=r"jax\.distributed\.initialize\(\)"):
        channel.open_channel()


@pytest.mark.parametrize("missing", channel.METHODS)
def test_a_client_without_a_method_is_an_error_that_names_it(monkeypatch, missing):
    client = SimpleNamespace(**{name: print for name in channel.METHODS if name != missing})
    monkeypatch.setattr(channel, "distributed", SimpleNamespace(global_state=SimpleNamespace(client=client)))
    with pytest.raises(errors.ConfigurationError, match=f"without {missing},"):
        channel.open_channel()


def test_another_place_of_the_client_is_an_error(monkeypatch):
    monkeypatch.setattr(channel, "distributed", None)
    with pytest.raises(errors.ConfigurationError, match="no client of its coordination service"):
        channel.open_channel()
