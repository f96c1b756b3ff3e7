"""Orbax, imported without a handler on the program's root logger, which absl, its logging package, adds on import."""

from __future__ import annotations

import logging

_before = tuple(logging.root.handlers)

import orbax.checkpoint as ocp  # noqa: E402

# With a handler there, logging.basicConfig() of the program would silently do nothing. What Orbax logs later, while
# it writes, may still add one if the program has none by then.
for _handler in set(logging.root.handlers).difference(_before):
    logging.root.removeHandler(_handler)

__all__ = ["ocp"]
