from __future__ import annotations

import inspect

import pytest

import eventtrain as et
from eventtrain import errors


def test_the_module_exports_every_error_it_defines() -> None:
    defined = {
        name
        for name, thing in vars(errors).items()
        if inspect.isclass(thing) and issubclass(thing, BaseException) and thing.__module__ == errors.__name__
    }
    assert set(errors.__all__) == defined


@pytest.mark.parametrize("name", errors.__all__)
def test_every_error_is_an_eventtrain_error_and_stands_in_the_outline(name: str) -> None:
    assert issubclass(getattr(errors, name), et.EventTrainError)
    assert name in (errors.__doc__ or "")
    assert getattr(errors, name).__doc__


def test_the_outline_shows_the_tree_that_the_classes_form() -> None:
    lines = [line for line in (errors.__doc__ or "").splitlines() if line.strip() and line.startswith("    ")]
    parents: list[type[BaseException]] = []
    for line in lines:
        stripped = line.lstrip(" │├└─")
        depth = (len(line) - len(stripped) - 4) // 4
        cls = getattr(errors, stripped.split()[0])
        if depth:
            assert parents[depth - 1] in cls.__bases__
        parents[depth:] = [cls]


def test_a_rejected_command_tells_its_reason() -> None:
    assert errors.CommandRejectedError("Not carried out.", reason="too late").reason == "too late"


def test_wrong_options_and_unreadable_events_are_value_errors_too() -> None:
    assert issubclass(et.ConfigurationError, ValueError)
    assert issubclass(et.EventParseError, ValueError)
