"""Which checkpoints are kept: the newest, the best, every n-th, the named; nothing else, and never less."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eventtrain.subscribers.checkpointing.retention import OwnCheckpoint, Retention

values = st.none() | st.floats(allow_nan=True, allow_infinity=True, width=16)
checkpoints = st.lists(
    st.builds(OwnCheckpoint, step=st.integers(0, 50), value=values, named=st.booleans()), max_size=15
)
counts = st.none() | st.integers(1, 5)


def numbers(committed: list[OwnCheckpoint]) -> list[float]:
    return [one.value for one in committed if one.value is not None and not math.isnan(one.value)]


@given(checkpoints, st.integers(1, 5), counts, counts, st.sampled_from(["min", "max"]))
def test_what_goes_is_kept_by_no_rule_and_what_stays_by_one(
    committed: list[OwnCheckpoint], newest: int, best: int | None, every: int | None, mode: str
) -> None:
    rules = Retention(newest, best, every, mode)  # type: ignore[arg-type]
    surplus = rules.surplus(committed)
    gone = {id(one) for one in surplus}
    left = [one for one in committed if id(one) not in gone]
    assert [id(one) for one in committed[-newest:]] == [id(one) for one in left[-newest:]]
    assert all(not one.named and not (every and one.step % every == 0) for one in surplus)
    order = sorted(numbers(committed), reverse=mode == "max")
    assert sorted(numbers(left), reverse=mode == "max")[: best or 0] == order[: best or 0]
    worst_kept = order[: best or 0][-1:]
    for one in left[: max(0, len(left) - newest)]:
        by_rule = one.named or (every and one.step % every == 0)
        assert by_rule or (worst_kept and one.value is not None and one.value in order[: best or 0])
    assert rules.surplus(left) == []


@given(checkpoints, counts, counts)
def test_without_a_limit_nothing_goes(
    committed: list[OwnCheckpoint], best: int | None, every: int | None
) -> None:
    assert Retention(None, best, every).surplus(committed) == []


@pytest.mark.parametrize(("mode", "gone"), [("min", [2, 4]), ("max", [1, 3])])
def test_of_equal_values_the_earlier_one_is_the_best(mode: str, gone: list[int]) -> None:
    committed = [
        OwnCheckpoint(1, 1.0),
        OwnCheckpoint(2, 2.0),
        OwnCheckpoint(3, 1.0),
        OwnCheckpoint(4, 2.0),
        OwnCheckpoint(5),
    ]
    rules = Retention(1, 2, None, mode)  # type: ignore[arg-type]
    assert [one.step for one in rules.surplus(committed)] == gone
    only_one = Retention(1, 1, None, mode)  # type: ignore[arg-type]
    assert [one.step for one in only_one.surplus(committed)] == sorted(
        {1, 2, 3, 4} - {1 if mode == "min" else 2}
    )
