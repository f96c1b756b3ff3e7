"""``UserFrames``: removes the frames of eventtrain and JAX from the traceback of what leaves ``fit``.

An error in a step function passes some twenty frames of eventtrain and some twenty of JAX, between those that its
author wrote. The exception stays the object that was raised, with its cause, context and notes; only
``__traceback__`` of it, and of those in its chain, becomes shorter.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import TracebackType
from typing import Any, cast

from eventtrain.errors import EventTrainError

VARIABLE = "EVENTTRAIN_TRACEBACK"
"""Environment variable: with the value "full" nothing is removed."""

HIDDEN = {"eventtrain", "jax", "jaxlib", "anyio", "concurrent", "contextlib", "threading"}
"""Packages whose frames are removed: the last four only connect threads and blocks of eventtrain."""


class UserFrames:
    """A block around a call that users make. What it raises has the frames of user code only, below the caller's.

    If no frame is of user code, nothing is removed, since the fault may be ours; except of an ``EventTrainError``,
    whose message says what to do, and of a Ctrl-C.

    Not made with ``contextmanager``, which would restore the traceback.

    Args:
        everything: remove nothing.
    """

    __slots__ = ("_everything",)

    def __init__(self, *, everything: bool) -> None:
        self._everything = everything

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self.remove_from(error)

    def remove_from(self, error: BaseException) -> None:
        """Removes the frames from ``error``, which is about to leave the call."""
        if self._everything or os.environ.get(VARIABLE, "").lower() == "full":
            return
        chain = list(_chain(error))
        is_of_user = any(_kept(one) for one in chain)
        is_explained = isinstance(error, EventTrainError) or (
            isinstance(error, KeyboardInterrupt) and not error.args
        )
        if not (is_of_user or is_explained):
            return
        for one in chain:
            kept = _kept(one)
            if not kept and one is not error:
                kept = _frames(one)[-1:]  # where it was raised: the only thing known of it
            one.__traceback__ = _linked(kept)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yields ``error``, its causes and contexts, and the members of groups, each once."""
    waiting, seen = [error], set[int]()
    while waiting:
        one = waiting.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        waiting += [other for other in (one.__cause__, one.__context__) if other is not None]
        if isinstance(one, BaseExceptionGroup):
            waiting += cast("BaseExceptionGroup[Any]", one).exceptions


def _frames(error: BaseException) -> list[TracebackType]:
    found, traceback = list[TracebackType](), error.__traceback__
    while traceback is not None:
        found.append(traceback)
        traceback = traceback.tb_next
    return found


def _kept(error: BaseException) -> list[TracebackType]:
    """Returns the entries of its traceback that are of user code."""
    return [entry for entry in _frames(error) if _package_of(entry) not in HIDDEN]


def _package_of(entry: TracebackType) -> str:
    return str(entry.tb_frame.f_globals.get("__name__", "")).partition(".")[0]


def _linked(entries: list[TracebackType]) -> TracebackType | None:
    following: TracebackType | None = None
    for entry in reversed(entries):
        following = TracebackType(following, entry.tb_frame, entry.tb_lasti, entry.tb_lineno)
    return following
