"""Many files at once, and each tried again. Blocking; any thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import TypeVar

from eventtrain.errors import StorageError

T = TypeVar("T")
R = TypeVar("R")


def retried(action: Callable[[], R], *, retries: int, delay_s: float, stopping: threading.Event) -> R:
    """What ``action`` returns, tried again where that may help, until ``stopping`` is set.

    Args:
        action: what to do.
        retries, delay_s: so many more tries, the first after ``delay_s`` seconds, then twice as long each.
        stopping: no further try.

    Raises:
        StorageError: of the last attempt.
    """
    for attempt in range(1, retries + 2):
        try:
            return action()
        except StorageError as error:
            if not error.may_pass or attempt > retries or stopping.wait(delay_s):
                raise StorageError(f"{error} (attempt {attempt})") from None
        delay_s *= 2
    raise AssertionError("unreachable")


def at_once(action: Callable[[T], R], items: Iterable[T], *, threads: int, name: str) -> list[R]:
    """``action`` of each item, in order, by several threads; the first that raises ends them all.

    The threads are daemons, unlike an executor's: one that hangs on a dead server does not keep a program from ending.
    """
    todo = list(enumerate(items))[::-1]
    results: dict[int, R] = {}
    failures: list[BaseException] = []

    def work() -> None:
        while not failures:
            try:
                index, item = todo.pop()
            except IndexError:
                return
            try:
                results[index] = action(item)
            except BaseException as error:
                failures.append(error)

    count = min(threads, len(todo))
    workers = [threading.Thread(target=work, name=f"eventtrain {name}", daemon=True) for _ in range(count)]
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    except BaseException as error:
        failures.append(error)
        raise
    if failures:
        raise failures[0]
    return [results[index] for index in sorted(results)]
