"""``RedisEvents``: sends the events of a run to a Redis stream."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import SecretStr

from eventtrain.events.names import EventClass
from eventtrain.subscribers.base import RunContext
from eventtrain.subscribers.brokers.batches import Message
from eventtrain.subscribers.brokers.broker_events import BrokerEvents, plain, public_target, require_token
from eventtrain.subscribers.brokers.sender import BrokerError
from eventtrain.validation.annotations import checked
from eventtrain.validation.arguments import require_count
from eventtrain.validation.optional_imports import import_optional, require_installed

redis_client = import_optional("redis.asyncio", extra="redis", used_by="RedisEvents")
redis_errors = import_optional("redis.exceptions", extra="redis", used_by="RedisEvents")

MOST_BYTES = 2**29
"""Of one value."""
TIMEOUT_S = 5.0


class RedisEvents(BrokerEvents):
    """Sends each event of a run to a Redis stream (XADD), in their order and none twice.

    Args:
        url: of the server, ``redis://host:6379/0`` or ``rediss://...``, with a user and password if it needs them.
            Messages and logs show scheme, host and port only.
        steps, limit, finish_timeout_s, types: as of ``NATSEvents``.
        stream: first part of the key.
        max_messages: the stream is trimmed to about this many entries (MAXLEN); None: it is never trimmed.

    The key is ``<stream>:<run_id>:events``. The id of an entry is ``<attempt>-<number>``, so that one that is sent
    again is not stored again. Its field ``events`` is a JSON array of up to 500 events: ``list[et.AnyEvent]``.

    Raises:
        ConfigurationError: redis is not installed, or an argument is invalid.
    """

    @checked
    def __init__(
        self,
        url: str | SecretStr,
        *,
        steps: Literal["windows", "each", "none"] = "windows",
        limit: int = 50_000,
        stream: str = "eventtrain",
        max_messages: int | None = None,
        finish_timeout_s: float = 10.0,
        types: tuple[EventClass, ...] = (),
    ) -> None:
        require_installed(redis_client)
        super().__init__(steps=steps, limit=limit, types=types, finish_timeout_s=finish_timeout_s)
        require_count("RedisEvents", "max_messages", max_messages, at_least=1, optional=True)
        self._public = public_target("RedisEvents", url, ("redis", "rediss"))
        require_token("RedisEvents", "stream", stream)
        self._url = SecretStr(plain(url))
        self._stream = stream
        self._max_messages = max_messages

    @property
    def _target(self) -> str:
        return self._public

    def _transport(self, run: RunContext, target: str) -> RedisTransport:
        key = f"{self._stream}:{run.run_id}:events{self._suffix}"
        return RedisTransport(self._url, target, key, run.attempt, self._max_messages)


class RedisTransport:
    """``Transport`` over redis-py."""

    def __init__(self, url: SecretStr, target: str, key: str, attempt: int, max_messages: int | None) -> None:
        self.target = target
        self.most_bytes = MOST_BYTES
        self._url = url
        self._key = key
        self._attempt = attempt
        self._max_messages = max_messages
        self._client: Any = None
        self._tried = 0

    async def open(self) -> None:
        """Connects."""
        try:
            self._client = redis_client.Redis.from_url(
                self._url.get_secret_value(),
                socket_timeout=TIMEOUT_S,
                socket_connect_timeout=TIMEOUT_S,
                single_connection_client=True,
                client_name="eventtrain",
                retry=None,
            )
            await self._client.ping()
        except Exception as error:
            raise _error(error) from None

    async def send(self, message: Message) -> None:
        """Adds an entry; one that is there already is not added again."""
        entry, again = f"{self._attempt}-{message.number}", message.number == self._tried
        self._tried = message.number
        try:
            try:
                await self._client.xadd(
                    self._key, {"events": message.body}, id=entry, maxlen=self._max_messages, approximate=True
                )
            except redis_errors.ResponseError as error:
                if "equal or smaller" not in str(error):
                    raise
                # Sent again: it was stored, and the answer was lost.
                if not again:
                    raise BrokerError(f"something else has written to the stream {self._key}") from None
        except BrokerError:
            raise
        except Exception as error:
            raise _error(error) from None

    async def close(self) -> None:
        """Disconnects."""
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()


def _error(error: Exception) -> BrokerError:
    if isinstance(error, redis_errors.AuthenticationError):
        return BrokerError("the server refuses the user or the password")
    if isinstance(error, redis_errors.NoPermissionError):
        return BrokerError("the permissions of this user do not suffice")
    if isinstance(error, redis_errors.OutOfMemoryError):
        return BrokerError("the server has no memory left")
    if isinstance(error, (redis_errors.TimeoutError, TimeoutError)):
        return BrokerError("it did not answer in time")
    if isinstance(error, (redis_errors.ConnectionError, OSError)):
        return BrokerError("the connection was refused or lost")
    return BrokerError(f"it failed with {type(error).__name__}")
