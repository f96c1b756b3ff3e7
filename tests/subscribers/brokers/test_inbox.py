"""Commands from outside are carried out once, before they expire, and each is answered."""

from __future__ import annotations

import json
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any

import anyio
import pytest

import eventtrain as et
from eventtrain.events import commands
from eventtrain.subscribers.brokers import inbox
from eventtrain.subscribers.brokers.inbox import CommandInbox

SET = {"kind": "set_hyperparam", "name": "learning_rate", "value": 0.1}


class StubControl:
    """Records what it is asked for, and answers it."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.held: anyio.Event | None = None
        self.raises: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        def send(*args: Any, **kwargs: Any) -> Any:
            if isinstance(self.raises, et.ConfigurationError):
                raise self.raises
            self.calls.append((name, *args, kwargs))
            return self

        return send

    async def result(self) -> et.CommandApplied:
        if self.raises is not None:
            raise self.raises
        if self.held is not None:
            await self.held.wait()
        return et.CommandApplied(step=7, command=commands.Pause())


class Box:
    def __init__(self) -> None:
        self.control = StubControl()
        self.refused = Counter[str]()
        self.accepted = 0
        control: Any = self.control
        self._inbox = CommandInbox(control, lambda reason: self.refused.update([reason]), self._accept)

    def _accept(self) -> None:
        self.accepted += 1

    async def ask(self, command: Any = SET, **fields: Any) -> dict[str, Any]:
        expires = (datetime.now(UTC) + timedelta(seconds=30)).isoformat()
        return await self.send(
            json.dumps({"id": "a", "expires": expires, "command": command, **fields}).encode()
        )

    async def send(self, data: bytes) -> dict[str, Any]:
        return json.loads(await self._inbox.answer(data))


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"  # as the thread that sends


async def test_a_command_is_carried_out_once_and_answered_with_its_event() -> None:
    box = Box()
    answer = await box.ask()
    assert answer["id"] == "a"
    assert et.parse_event(answer["applied"]).step == 7
    assert box.control.calls == [("set_hyperparam", "learning_rate", 0.1, {"path": None, "reason": ""})]
    assert await box.ask() == {"id": "a", "refused": "its id was used before"}
    assert len(box.control.calls) == box.accepted == 1
    assert box.refused == {"its id was used before": 1}


@pytest.mark.parametrize(
    ("command", "call"),
    [
        ({"kind": "scale_hyperparam", "name": "lr", "factor": 0.5}, "scale_hyperparam"),
        ({"kind": "stop"}, "stop"),
        ({"kind": "save_checkpoint"}, "checkpoint"),
        ({"kind": "take_snapshot", "tag": "x"}, "snapshot"),
        ({"kind": "restore", "target": "x"}, "restore"),
        ({"kind": "pause"}, "pause"),
        ({"kind": "resume"}, "resume"),
        ({"kind": "evaluate"}, "evaluate"),
        ({"kind": "profile", "steps": 3}, "profile"),
    ],
)
async def test_every_command_calls_its_method_of_control(command: Any, call: str) -> None:
    box = Box()
    assert "applied" in await box.ask(command)
    assert hasattr(et.Control, call)
    assert [name for name, *_ in box.control.calls] == [call]


@pytest.mark.parametrize(
    "data",
    [
        b"", b"nothing", b"\xff\xfe", b"[]", b"[" * 60_000, b"{" + b" " * 70_000 + b"}",
        b'{"id": "a"}', b'{"id": "a", "expires": "2999-01-01T00:00:00Z", "command": {"kind": "exec"}}',
        b'{"id": "", "expires": "2999-01-01T00:00:00Z", "command": {"kind": "pause"}}',
        b'{"id": "a", "expires": "2999-01-01T00:00:00", "command": {"kind": "pause"}}',
        b'{"id": "a", "expires": "2999-01-01T00:00:00Z", "command": {"kind": "pause"}, "secret-token": 1}',
        b'{"id": "a", "expires": "2999-01-01T00:00:00Z", "command": {"kind": "profile", "steps": NaN}}',
    ],
)  # fmt: skip
async def test_garbage_is_refused_by_name_and_not_quoted(data: bytes) -> None:
    box = Box()
    answer = await box.send(data)
    assert set(answer) == {"id", "refused"}
    assert len(json.dumps(answer)) < 1_000
    assert box.control.calls == []
    ((reason, count),) = box.refused.items()
    assert count == 1
    assert "secret-token" not in reason


async def test_what_has_expired_or_never_will_is_refused() -> None:
    box = Box()
    now = datetime.now(UTC)
    for moment, reason in (
        (now, "it has expired"),
        (now + timedelta(hours=2), "expires in more than 3600 s"),
    ):
        answer = await box.ask(expires=moment.isoformat())
        assert reason in answer["refused"]
    for name, forged in (("b", {"due": 3}), ("c", {"source": "dashboard"})):
        answer = await box.ask({"kind": "pause", **forged}, id=name)
        assert "due, cause and source" in answer["refused"]
    assert box.control.calls == []


async def test_what_the_run_rejects_is_answered_with_its_reason() -> None:
    box = Box()
    box.control.raises = et.CommandRejectedError(
        "The command was rejected", reason="no such hyperparameter 'x'"
    )
    assert await box.ask() == {"id": "a", "refused": "no such hyperparameter 'x'"}
    box.control.raises = et.ConfigurationError("expected a number")
    assert await box.ask(id="b") == {"id": "b", "refused": "expected a number"}
    assert box.refused == {"the run rejected it": 1, "it cannot work": 1}


async def test_a_command_is_waited_for_until_it_expires_and_not_too_many_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(inbox, "MOST_WAITING", 2)
    box = Box()
    box.control.held = anyio.Event()
    answers: list[dict[str, Any]] = []

    async def ask(name: str) -> None:
        expires = (datetime.now(UTC) + timedelta(seconds=0.2)).isoformat()
        answers.append(await box.ask(id=name, expires=expires))

    async with anyio.create_task_group() as tasks:
        for name in "abc":
            tasks.start_soon(ask, name)
    assert answers[0] == {"id": "c", "refused": "too many commands wait"}
    assert {answer["refused"] for answer in answers[1:]} == {
        "the run has not answered; it may still carry it out"
    }


async def test_ids_are_remembered_until_they_expire_and_then_make_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(inbox, "MOST_IDS", 3)
    box = Box()
    soon = (datetime.now(UTC) + timedelta(seconds=0.2)).isoformat()
    for name in "abc":
        assert "applied" in await box.ask(id=name, expires=soon)
    assert "too many" in (await box.ask(id="d"))["refused"]
    await anyio.sleep(0.25)
    assert "applied" in await box.ask(id="d")
