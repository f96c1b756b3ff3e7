"""``CommandInbox``: commands that come from outside over a broker, checked, carried out once, and answered."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from eventtrain.control.control import Control
from eventtrain.control.issue import first_problem, issue
from eventtrain.errors import CommandRejectedError, ConfigurationError
from eventtrain.events.commands import AnyCommand

logger = logging.getLogger("eventtrain")

MOST_BYTES = 65_536
"""Of a command's JSON."""
MOST_WAITING = 64
"""Commands that may wait for their answer."""
MOST_IDS = 10_000
"""Ids that are remembered until they expire."""
LONGEST = timedelta(hours=1)
"""The latest that a command may expire from now."""


class Request(BaseModel):
    """A command with an id of its sender's choice, and the moment from which on it must not be carried out."""

    model_config = ConfigDict(extra="forbid")

    id: str = Field(min_length=1, max_length=128)
    expires: AwareDatetime
    command: AnyCommand


class CommandInbox:
    """Carries out requests. All methods run on the event loop of the sending thread.

    Args:
        control: of the run.
        refuse: counts a refused request; called with the reason.
        accept: counts one that was carried out.
    """

    def __init__(self, control: Control, refuse: Callable[[str], None], accept: Callable[[], None]) -> None:
        self._control = control
        self._refuse = refuse
        self._accept = accept
        self._expiries: dict[str, datetime] = {}
        self._waiting = 0

    async def answer(self, data: bytes) -> bytes:
        """Returns the answer to a request, as JSON: ``{"id", "applied"}`` or ``{"id", "refused"}``."""
        now, name = datetime.now(UTC), None
        try:
            request = _parsed(data)
            name = request.id
            self._admit(request, now)
            self._waiting += 1
            try:
                applied = await self._carry_out(request)
            finally:
                self._waiting -= 1
        except _Refused as refused:
            self._refuse(refused.public)
            return json.dumps({"id": name, "refused": str(refused)}).encode()
        self._accept()
        return b'{"id":%b,"applied":%b}' % (json.dumps(name).encode(), applied)

    def _admit(self, request: Request, now: datetime) -> None:
        """Raises _Refused if the request expired, came before, or is one too many."""
        if request.expires <= now:
            raise _Refused("it has expired")
        if request.expires > now + LONGEST:
            raise _Refused(f"it expires in more than {LONGEST.total_seconds():g} s")
        if request.id in self._expiries:
            raise _Refused("its id was used before")
        if len(self._expiries) >= MOST_IDS:
            self._expiries = {name: when for name, when in self._expiries.items() if when > now}
        if len(self._expiries) >= MOST_IDS or self._waiting >= MOST_WAITING:
            raise _Refused("too many commands wait")
        self._expiries[request.id] = request.expires

    async def _carry_out(self, request: Request) -> bytes:
        left_s = (request.expires - datetime.now(UTC)).total_seconds()
        try:
            sent = issue(self._control, request.command)
            applied = await asyncio.wait_for(sent.result(), max(0.0, left_s))
        except CommandRejectedError as error:
            raise _Refused(error.reason, "the run rejected it") from None
        except ConfigurationError as error:
            raise _Refused(str(error), "it cannot work") from None
        except TimeoutError:
            raise _Refused("the run has not answered; it may still carry it out") from None
        return applied.model_dump_json().encode()


class _Refused(Exception):
    """``public`` is the reason in logs and events; it contains nothing that the sender wrote."""

    def __init__(self, reason: str, public: str | None = None) -> None:
        super().__init__(reason)
        self.public = public or reason


def _parsed(data: bytes) -> Request:
    if len(data) > MOST_BYTES:
        raise _Refused(f"it is larger than {MOST_BYTES} bytes")
    try:
        return Request.model_validate_json(data)
    except ValidationError as error:
        raise _Refused(first_problem(error), "it is not a valid command") from None
