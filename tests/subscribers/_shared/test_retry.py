"""Attempts and the delays between them."""

from __future__ import annotations

import math
import threading

import pytest

from eventtrain.errors import StorageError
from eventtrain.subscribers._shared.retry import attempts, retry


def test_delays_double_up_to_the_longest_and_come_between_attempts_only() -> None:
    delays: list[float] = []

    def wait(delay_s: float) -> bool:
        delays.append(delay_s)
        return False

    assert list(attempts(4, 0.5, wait, max_delay_s=1.5)) == [1, 2, 3, 4, 5]
    assert delays == [0.5, 1.0, 1.5, 1.5]
    assert list(attempts(0, 0.5, wait)) == [1]
    assert len(delays) == 4


def test_a_wait_that_returns_true_ends_the_attempts() -> None:
    answers = iter([False, False, True])
    assert list(attempts(math.inf, 0.0, lambda delay_s: next(answers))) == [1, 2, 3]


def test_only_what_may_pass_is_tried_again_and_the_last_error_counts_the_attempts() -> None:
    def failing(may_pass: bool) -> None:
        calls.append(None)
        raise StorageError("no", may_pass=may_pass)

    for may_pass, stopped, expected in ((True, False, 3), (False, False, 1), (True, True, 1)):
        calls: list[None] = []
        stopping = threading.Event()
        if stopped:
            stopping.set()
        with pytest.raises(StorageError, match=rf"^no \(attempt {expected}\)$"):
            retry(lambda may_pass=may_pass: failing(may_pass), retries=2, delay_s=0.0, stopping=stopping)
        assert len(calls) == expected


def test_the_result_of_the_first_attempt_that_works_is_returned() -> None:
    outcomes = iter([StorageError("no", may_pass=True), 7])

    def action() -> int:
        outcome = next(outcomes)
        if isinstance(outcome, StorageError):
            raise outcome
        return outcome

    assert retry(action, retries=1, delay_s=0.0, stopping=threading.Event()) == 7
