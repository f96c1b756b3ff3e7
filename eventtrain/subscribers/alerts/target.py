"""``AlertTarget``: where alerts are sent, by URL."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import SecretStr

from eventtrain.errors import ConfigurationError


@dataclass(frozen=True)
class AlertTarget:
    """One place where alerts are sent.

    Attributes:
        url: ``http://`` and ``https://`` are webhooks, which are sent JSON; everything else is Apprise's, such as
            ``slack://...``, ``mailto://...``. It may hold secrets and is shown nowhere.
        label: what it is called instead.
        key: a webhook is signed with it; text that is not empty.
        allow_private: a webhook may lead into the own network.
    """

    url: str | SecretStr
    label: str = "target"
    key: str | SecretStr | None = None
    allow_private: bool = False

    def __post_init__(self) -> None:
        for name, given in (("url", self.url), ("key", self.key)):
            if given is not None and not isinstance(given, (str, SecretStr)):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise ConfigurationError(f"Alerts: {name}= needs text. What was given is not shown.")
        object.__setattr__(self, "url", secret(self.url))
        object.__setattr__(self, "key", None if self.key is None else secret(self.key))
        if isinstance(self.key, SecretStr) and not self.key.get_secret_value():
            raise ConfigurationError(
                "Alerts: key= is empty, and anybody could sign with that. Leave it out, or set it."
            )


def secret(text: str | SecretStr) -> SecretStr:
    """``text``, shown nowhere."""
    return text if isinstance(text, SecretStr) else SecretStr(text)
