"""``NATSEvents``: sends the events of a run to NATS JetStream, and takes commands from there."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from secrets import token_hex
from typing import Any, Literal

from pydantic import SecretStr

from eventtrain.events.names import EventClass
from eventtrain.subscribers.base import RunContext
from eventtrain.subscribers.brokers.batches import Message
from eventtrain.subscribers.brokers.broker_events import BrokerEvents, plain, public_target, require_token
from eventtrain.subscribers.brokers.inbox import CommandInbox
from eventtrain.subscribers.brokers.sender import BrokerError, BrokerSender
from eventtrain.validation.annotations import checked
from eventtrain.validation.optional_imports import import_optional, require_installed

nats = import_optional("nats", extra="nats", used_by="NATSEvents")
nats_errors = import_optional("nats.errors", extra="nats", used_by="NATSEvents")
js_errors = import_optional("nats.js.errors", extra="nats", used_by="NATSEvents")

HEADER_BYTES = 1024
"""Of a message's limit, left for its headers."""
CONNECT_TIMEOUT_S = 2
ACK_TIMEOUT_S = 5.0
DUPLICATE_WINDOW_S = 3600.0
"""For so long the server knows the ids of messages, if the stream is made here. A server that stored a message and was
then away for longer would store it a second time."""
TOO_LARGE = (10054,)
"""JetStream's error codes for a message above the limit of the stream."""


class NATSEvents(BrokerEvents):
    """Sends each event of a run to a stream of NATS JetStream, in their order and none twice; commands come back.

    Args:
        url: of the server, ``nats://host:4222`` or ``tls://...``, with a user and password or a token if it needs one.
            Messages and logs show scheme, host and port only.
        steps: "windows": one StepsCompleted for each window; "each": StepCompleted and EvalStepCompleted; "none".
        limit: events that may wait while the server is away; a window counts as its steps. Of more, the newest are
            dropped, counted and reported; lifecycle events only at twice the limit.
        commands: whether to take commands. Permissions of the server decide who may send them.
        stream: name of the stream in JetStream, and first part of the subjects. It is made if it does not exist.
        finish_timeout_s: how long the end of the run waits for what was not sent. It ends earlier with the trainer's
            ``drain_timeout_s``.
        types: event classes of your own that are sent too.
        credentials: path of a ``.creds`` file of the server's.

    A message on the subject ``<stream>.<run_id>.events`` is a JSON array of up to 500 events: ``list[et.AnyEvent]``. It
    is sent again until the server has acknowledged it, with the id ``run_id:attempt:number``, by which the stream
    leaves out doubles. SubscriberFailed reports the beginning of an outage, and SubscriberLagged what was dropped.
    Dots of the run_id are ``_`` in subjects.

    Commands are requests on ``<stream>.<run_id>.commands``: ``{"id": ..., "expires": ..., "command": {...}}``. The id
    is any text, the moment is within the next hour, and the command is an ``et.AnyCommand``. Each is answered by
    ``{"id", "applied"}`` or ``{"id", "refused"}``. Expired ones, and those whose id was used before, are refused.

    Raises:
        ConfigurationError: nats-py is not installed, or an argument is invalid.
    """

    @checked
    def __init__(
        self,
        url: str | SecretStr,
        *,
        steps: Literal["windows", "each", "none"] = "windows",
        limit: int = 50_000,
        commands: bool = False,
        stream: str = "eventtrain",
        finish_timeout_s: float = 10.0,
        types: tuple[EventClass, ...] = (),
        credentials: str | Path | None = None,
    ) -> None:
        require_installed(nats)
        super().__init__(steps=steps, limit=limit, types=types, finish_timeout_s=finish_timeout_s)
        self._public = public_target("NATSEvents", url, ("nats", "tls"))
        require_token("NATSEvents", "stream", stream)
        self._url = SecretStr(plain(url))
        self._stream = stream
        self._commands = commands
        self._credentials = None if credentials is None else str(credentials)

    @property
    def _target(self) -> str:
        return self._public

    def _transport(self, run: RunContext, target: str) -> NATSTransport:
        token = run.run_id.replace(".", "_")
        transport = NATSTransport(
            self._url,
            target,
            stream=self._stream,
            subject=f"{self._stream}.{token}.events",
            message_id=f"{run.run_id}:{run.attempt}{self._suffix}:",
            credentials=self._credentials,
        )
        if self._commands:
            inbox = CommandInbox(
                run.control.with_source("NATS"), self._refuse, lambda: self._buffer.count(commands=1)
            )
            transport.receive = (f"{self._stream}.{token}.commands", inbox.answer)
        return transport

    def _refuse(self, reason: str) -> None:
        sender: BrokerSender | None = self._sender
        if sender is not None:
            sender.refuse(reason)


class NATSTransport:
    """``Transport`` over nats-py. It does not reconnect by itself: the sender opens it again.

    Attributes:
        receive: subject of commands, and what answers them; None to take none.
    """

    def __init__(
        self,
        url: SecretStr,
        target: str,
        *,
        stream: str,
        subject: str,
        message_id: str,
        credentials: str | None,
    ) -> None:
        self.target = target
        self.most_bytes = 0
        self.receive: tuple[str, Callable[[bytes], Awaitable[bytes]]] | None = None
        self._url = url
        self._stream = stream
        self._subject = subject
        self._message_id = message_id
        self._credentials = credentials
        self._client: Any = None
        self._is_connecting = False
        self._tried = 0
        self._broken: asyncio.Future[str] | None = None
        self._answers: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Connects, makes the stream if it does not exist, and subscribes to commands."""
        self._broken = asyncio.get_running_loop().create_future()
        self._is_connecting = True
        self._client = client = nats.NATS()
        try:
            await client.connect(
                self._url.get_secret_value(),
                name="eventtrain",
                allow_reconnect=False,
                connect_timeout=CONNECT_TIMEOUT_S,
                pending_size=0,  # its buffer would deliver what was reported as failed
                ping_interval=5,
                max_outstanding_pings=2,
                user_credentials=self._credentials,
                error_cb=self._note,
                disconnected_cb=self._disconnected,
            )
            self._is_connecting = False
            self.most_bytes = max(1, client.max_payload - HEADER_BYTES)
            self._jetstream = client.jetstream(timeout=ACK_TIMEOUT_S)
            await self._until_broken(self._require_stream())
            if self.receive is not None:
                await client.subscribe(self.receive[0], cb=self._received)
        except Exception as error:
            raise self._error(error) from None

    async def send(self, message: Message) -> None:
        """Publishes a message and waits for the acknowledgement of the stream."""
        if len(message.body) > self.most_bytes:
            raise BrokerError(f"the server takes {self.most_bytes} bytes in a message", too_large=True)
        again, self._tried = message.number == self._tried, message.number
        try:
            if await self._publish(message) and not again:
                # Another run has used this id, with this run_id and attempt: its message is there, and ours is not.
                self._message_id += f"{token_hex(4)}:"
                await self._publish(message)
        except Exception as error:
            raise self._error(error) from None

    async def _publish(self, message: Message) -> bool:
        """Publishes a message; returns whether the stream had one with its id."""
        headers = {"Nats-Msg-Id": f"{self._message_id}{message.number}", "Content-Type": "application/json"}
        publish = self._jetstream.publish(self._subject, message.body, stream=self._stream, headers=headers)
        return bool((await self._until_broken(publish)).duplicate)

    async def close(self) -> None:
        """Disconnects."""
        client, self._client = self._client, None
        for answer in self._answers:
            answer.cancel()
        if client is not None:
            connection = getattr(client, "_transport", None)
            try:
                await client.close()
            finally:
                if connection is not None:  # nats-py leaves it open if it was not connected completely
                    connection.close()

    async def _require_stream(self) -> None:
        try:
            await self._jetstream.stream_info(self._stream)
        except js_errors.NotFoundError:
            await self._jetstream.add_stream(
                name=self._stream, subjects=[f"{self._stream}.*.events"], duplicate_window=DUPLICATE_WINDOW_S
            )

    async def _until_broken(self, call: Any) -> Any:
        """Awaits ``call``, unless the server refuses it or the connection breaks, which nats-py would wait out."""
        assert self._broken is not None
        task = asyncio.ensure_future(call)
        try:
            await asyncio.wait([task, self._broken], return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise BrokerError(self._broken.result())
            return task.result()
        finally:
            task.cancel()

    async def _received(self, message: Any) -> None:
        """Answers a command in a task of its own, so that the next one need not wait."""
        assert self.receive is not None
        answer = self.receive[1]

        async def respond() -> None:
            text = await answer(message.data)
            if message.reply:
                await message.respond(text)

        task = asyncio.create_task(respond())
        self._answers.add(task)
        task.add_done_callback(self._answers.discard)

    # --- errors: their texts are written here, since those of the client may contain secrets ----------------------

    async def _note(self, error: Exception) -> None:
        if self._is_connecting:
            raise error  # nats-py would wait and try again
        if "permissions violation" in str(error).lower():
            subject = "commands" if ".commands" in str(error) else "events"
            self._break(f"the permissions of this user do not suffice for the {subject} of {self._stream}")

    async def _disconnected(self) -> None:
        self._break("the connection was lost")

    def _break(self, text: str) -> None:
        if self._broken is not None and not self._broken.done():
            self._broken.set_result(text)

    def _error(self, error: Exception) -> BrokerError:
        if isinstance(error, BrokerError):
            return error
        code = getattr(error, "err_code", None)
        if code in TOO_LARGE or isinstance(error, nats_errors.MaxPayloadError):
            return BrokerError("the server takes no message of this size", too_large=True)
        if self._broken is not None and self._broken.done():
            return BrokerError(self._broken.result())
        return BrokerError(_text_of(error, code))


def _text_of(error: Exception, code: int | None) -> str:
    text = str(error).lower()
    if isinstance(error, nats_errors.AuthorizationError) or "authorization violation" in text:
        return "the server refuses the user, password or token"
    if isinstance(error, (js_errors.NoStreamResponseError, js_errors.ServiceUnavailableError)):
        return "the server has no JetStream, or no stream takes the events"
    if isinstance(error, js_errors.APIError):
        return f"JetStream refuses the events (error code {code})"
    if isinstance(error, ConnectionRefusedError):
        return "the connection was refused"
    if isinstance(error, TimeoutError):
        return "it did not answer in time"
    return f"it failed with {type(error).__name__}"
