"""HTTP POSTs of JSON from a thread of their own: bounded in time and number, and silent about their URL."""

from __future__ import annotations

import base64
import http.client
import queue
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from email.message import Message
from time import monotonic
from typing import IO

from pydantic import SecretStr

from eventtrain.errors import ConfigurationError
from eventtrain.events import Event

RETRYABLE = frozenset({408, 425, 429, 500, 502, 503, 504})
"""HTTP statuses that may be different the next time."""


class Webhook(threading.Thread):
    """Posts events to one URL, in order, one at a time.

    The URL may hold secrets (in its userinfo, host, path or query): it is in no message, log or repr; ``label`` is.

    Args:
        url: http or https; ``user:password@`` becomes basic authentication. Redirects are not followed.
        label: what to call the target.
        timeout_s: for connecting and for each wait for the answer.
        retries, retry_delay_s: so many more tries, the first after ``retry_delay_s`` seconds, then twice as long each.
        failed: called on this thread with (event, reason) when an event is given up.

    Raises:
        ConfigurationError: the URL is none.
    """

    def __init__(
        self,
        url: str | SecretStr,
        *,
        label: str,
        timeout_s: float,
        retries: int,
        retry_delay_s: float,
        failed: Callable[[Event, str], None],
    ) -> None:
        super().__init__(name=f"eventtrain webhook {label}", daemon=True)
        self._url, self._headers = _split(url.get_secret_value() if isinstance(url, SecretStr) else url)
        self._label = label
        self._timeout_s = timeout_s
        self._retries = retries
        self._retry_delay_s = retry_delay_s
        self._failed = failed
        self._events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._opener = urllib.request.build_opener(_NoRedirects)
        self._posted = 0  # written by those who post only, and _done by this thread only: no lock
        self._done = 0

    def post(self, event: Event) -> None:
        """Have ``event`` delivered. Never blocks."""
        self._posted += 1
        self._events.put(event)

    def finish(self, timeout_s: float) -> int:
        """Wait for what is waiting to be delivered, at most ``timeout_s`` seconds; returns how much was not."""
        self._events.put(None)
        self.join(timeout_s)
        self._stopping.set()  # no further try
        return self._posted - self._done

    def run(self) -> None:
        """Deliver until ``finish``."""
        while (event := self._events.get()) is not None:
            _wait_until_stamped(event)
            reason = self._deliver(event.model_dump_json().encode())
            self._done += 1
            if reason is not None:
                self._failed(event, reason)

    def _deliver(self, body: bytes) -> str | None:
        """Try; returns why it was given up, None if it arrived."""
        delay_s = self._retry_delay_s
        for attempt in range(1, self._retries + 2):
            reason, again = self._try(body)
            if reason is None:
                return None
            if not again or attempt > self._retries or self._stopping.wait(delay_s):
                return f"{reason}, at attempt {attempt}"
            delay_s *= 2
        raise AssertionError("unreachable")

    def _try(self, body: bytes) -> tuple[str | None, bool]:
        """One attempt: why it failed, in words that cannot quote the URL, or None; and whether another makes sense."""
        try:
            request = urllib.request.Request(self._url.get_secret_value(), body, self._headers, method="POST")
            self._opener.open(request, timeout=self._timeout_s).close()
        except urllib.error.HTTPError as error:
            error.close()
            hint = "; redirects are not followed" if 300 <= error.code < 400 else ""
            return f"HTTP status {error.code}{hint}", error.code in RETRYABLE
        except urllib.error.URLError as error:
            return type(error.reason).__name__ if isinstance(
                error.reason, Exception
            ) else "no connection", True
        except (OSError, http.client.HTTPException) as error:
            return type(error).__name__, not isinstance(error, http.client.InvalidURL)
        except ValueError as error:
            return type(error).__name__, False
        return None, False


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> None:
        return None


def _split(url: str) -> tuple[SecretStr, dict[str, str]]:
    headers = {"Content-Type": "application/json", "User-Agent": "eventtrain"}
    try:
        parts = urllib.parse.urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
        parts = urllib.parse.urlsplit("")
    if not good:
        raise ConfigurationError(
            "Alerts(url=...): needs a URL such as https://host/path. The one given is not shown: it may hold secrets."
        )
    userinfo, at, host = parts.netloc.rpartition("@")
    if at:
        headers["Authorization"] = (
            "Basic " + base64.b64encode(urllib.parse.unquote(userinfo).encode()).decode()
        )
    return SecretStr(urllib.parse.urlunsplit(parts._replace(netloc=host, fragment=""))), headers


def _wait_until_stamped(event: Event) -> None:
    """The bus stamps an event when it routes it, a moment after ``publish`` has returned."""
    deadline_s = monotonic() + 1.0
    pause = threading.Event()
    while event.seq < 1 and monotonic() < deadline_s:
        pause.wait(0.002)
