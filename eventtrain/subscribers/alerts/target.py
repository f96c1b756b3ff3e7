"""``AlertTarget``: where alerts are sent, by URL, and the transport for each kind of URL."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import SecretStr

from eventtrain.errors import ConfigurationError
from eventtrain.subscribers.alerts.message import Transport
from eventtrain.validation.annotations import checked
from eventtrain.validation.optional_imports import import_optional

webhook = import_optional(
    "eventtrain.subscribers.alerts.webhook", extra="alerts", used_by="A webhook of Alerts"
)
apprise_transport = import_optional(
    "eventtrain.subscribers.alerts.apprise_transport",
    extra="alerts",
    used_by="A target of Alerts whose URL does not begin with http:// or https://",
)


@checked
@dataclass(frozen=True)
class AlertTarget:
    """A place where alerts are sent.

    Attributes:
        url: ``http://`` and ``https://`` are webhooks, which are sent JSON; all others are Apprise's, such as
            ``slack://...``, ``mailto://...``. It may hold secrets and is never shown.
        label: the name that is shown instead.
        key: signs the requests to a webhook; text that is not empty.
        allow_private: a webhook may be in a private network.
    """

    url: str | SecretStr
    label: str = "target"
    key: str | SecretStr | None = None
    allow_private: bool = False

    def __post_init__(self) -> None:
        for name, given in (("url", self.url), ("key", self.key)):
            if given is not None and not isinstance(given, (str, SecretStr)):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise ConfigurationError(
                    f"Alerts: {name}= must be text. The value given is not shown: it may be a secret."
                )
        object.__setattr__(self, "url", _secret(self.url))
        object.__setattr__(self, "key", None if self.key is None else _secret(self.key))
        if isinstance(self.key, SecretStr) and not self.key.get_secret_value():
            raise ConfigurationError(
                "Alerts: key= is empty, so that anyone could sign a request. Leave it out, or set it."
            )

    def connect(self, timeout_s: float) -> Transport:
        """Returns a transport to this target. Sends nothing and resolves no name yet.

        Args:
            timeout_s: for connecting, and for each wait for the answer.

        Raises:
            ConfigurationError: the URL cannot work, or a package is missing. No part of the URL is quoted.
        """
        url, key = _secret(self.url), None if self.key is None else _secret(self.key)
        if url.get_secret_value().partition(":")[0].lower() in ("http", "https"):
            return webhook.Webhook(url, key=key, allow_private=self.allow_private, timeout_s=timeout_s)
        if key is not None or self.allow_private:
            raise ConfigurationError(
                "Alerts: key= and allow_private= are for webhooks, whose URL begins with https:// or http://."
            )
        return apprise_transport.AppriseTransport(url, timeout_s=timeout_s)


def _secret(text: str | SecretStr) -> SecretStr:
    return text if isinstance(text, SecretStr) else SecretStr(text)
