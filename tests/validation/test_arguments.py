"""Arguments that cannot work are refused with their name, what was expected and what was given."""

from __future__ import annotations

import math
from typing import Any

import pytest

import eventtrain as et
from eventtrain.validation.arguments import require_choice, require_count, require_number


@pytest.mark.parametrize(
    ("value", "bounds", "expected"),
    [
        (0, {"above": 0}, "must be a finite number > 0, got 0."),
        (-1.5, {"at_least": 0}, "must be a finite number >= 0, got -1.5."),
        (1, {"above": 0, "below": 1}, "must be a finite number > 0 and < 1, got 1."),
        (1.1, {"at_least": 0, "at_most": 1}, "must be a finite number >= 0 and <= 1, got 1.1."),
        (math.nan, {}, "must be a finite number, got nan."),
        (math.inf, {"above": 0, "optional": True}, "must be a finite number > 0 or None, got inf."),
        (True, {}, "must be a finite number, got True."),
        ("1", {}, "must be a finite number, got '1'."),
        (None, {}, "must be a finite number, got None."),
    ],
)
def test_a_number_outside_its_bounds_is_refused(value: Any, bounds: Any, expected: str) -> None:
    with pytest.raises(et.ConfigurationError) as caught:
        require_number("Owner", "argument", value, **bounds)
    assert str(caught.value) == f"Owner(argument={value!r}): argument {expected}"


@pytest.mark.parametrize("value", [0, 2.0, True, "3", None])
def test_what_is_not_a_large_enough_integer_is_refused(value: Any) -> None:
    with pytest.raises(et.ConfigurationError) as caught:
        require_count("Owner", "argument", value, at_least=1)
    assert str(caught.value) == f"Owner(argument={value!r}): argument must be an integer >= 1, got {value!r}."


def test_what_is_not_among_the_choices_is_refused() -> None:
    with pytest.raises(et.ConfigurationError) as caught:
        require_choice("Owner", "argument", "c", ("a", "b"))
    assert str(caught.value) == """Owner(argument='c'): argument must be one of "a", "b", got 'c'."""


def test_bounds_that_are_met_and_none_where_it_is_optional_are_taken() -> None:
    require_number("Owner", "argument", 0, at_least=0, at_most=0)
    require_number("Owner", "argument", None, above=0, optional=True)
    require_count("Owner", "argument", 1, at_least=1)
    require_count("Owner", "argument", None, optional=True)
    require_choice("Owner", "argument", "a", ("a", "b"))
