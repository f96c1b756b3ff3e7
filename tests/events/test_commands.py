from __future__ import annotations

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from eventtrain import errors
from eventtrain.events import commands
from eventtrain.events.models import snake_case

COMMANDS = [
    commands.SetHyperparam(name="learning_rate", value=0.5, path="inner", due=3, reason="why"),
    commands.SetHyperparam(name="every", value=3),
    commands.SetHyperparam(name="nesterov", value=True),
    commands.ScaleHyperparam(name="learning_rate", factor=0.5, minimum=1e-6, maximum=1.0),
    commands.Stop(reason="enough"),
    commands.SaveCheckpoint(tag="best"),
    commands.TakeSnapshot(tag="before"),
    commands.Restore(target=7, part="params"),
    commands.Restore(target="before"),
    commands.Pause(),
    commands.Resume(),
    commands.Evaluate(cause=commands.Cause(event="epoch_completed", step=3, subscriber="plateau")),
    commands.Profile(steps=10),
    commands.TakeSample(name="text"),
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.kind)
def test_every_command_survives_its_json_exactly(command: commands.Command) -> None:
    adapter: TypeAdapter[commands.AnyCommand] = TypeAdapter(commands.AnyCommand)
    back = adapter.validate_json(command.model_dump_json())
    assert back == command
    assert type(back) is type(command)
    if isinstance(command, commands.SetHyperparam):
        assert isinstance(back, commands.SetHyperparam)
        assert type(back.value) is type(command.value)


def test_all_commands_have_a_case_here_and_their_class_name_as_kind() -> None:
    assert {type(command) for command in COMMANDS} == set(commands.Command.__subclasses__())
    for command in COMMANDS:
        assert command.kind == snake_case(type(command).__name__)


@given(st.sampled_from([float("nan"), float("inf"), -float("inf")]))
def test_a_value_that_is_no_finite_number_is_refused(value: float) -> None:
    with pytest.raises(ValidationError, match="finite"):
        commands.SetHyperparam(name="learning_rate", value=value)
    with pytest.raises(ValidationError, match="finite"):
        commands.ScaleHyperparam(name="learning_rate", factor=value)


def test_a_command_cannot_be_changed_and_takes_no_unknown_field() -> None:
    command = commands.Stop(reason="enough")
    with pytest.raises(ValidationError, match="frozen"):
        command.reason = "another"  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValidationError, match="extra"):
        commands.Stop(why="no such field")  # pyright: ignore[reportCallIssue]


async def test_the_result_of_a_command_that_nobody_sent_is_refused(anyio_backend: object) -> None:
    with anyio.fail_after(30):
        with pytest.raises(errors.CommandRejectedError, match="never sent") as caught:
            await commands.Pause().result()
    assert caught.value.reason == "never sent"
