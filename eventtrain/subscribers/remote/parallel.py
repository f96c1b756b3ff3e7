"""``in_parallel``: one blocking action for many items, in several daemon threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def in_parallel(action: Callable[[T], R], items: Iterable[T], *, threads: int, name: str) -> list[R]:
    """Returns ``action`` of each item, in order, computed by several threads; the first that raises ends them all.

    The threads are daemons, unlike an executor's: one that hangs on a dead server does not keep the program alive.
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
