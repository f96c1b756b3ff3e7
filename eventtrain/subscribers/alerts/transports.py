"""``connect``: from where alerts are to go to what sends them there, by the kind of its URL."""

from __future__ import annotations

from eventtrain.errors import ConfigurationError
from eventtrain.subscribers.alerts.sender import Target
from eventtrain.subscribers.alerts.target import AlertTarget, secret

try:
    from eventtrain.subscribers.alerts import webhook
except ModuleNotFoundError:
    webhook = None
try:
    from eventtrain.subscribers.alerts import apprise_transport as apprise_target
except ModuleNotFoundError:
    apprise_target = None


def connect(target: AlertTarget, timeout_s: float) -> Target:
    """What sends to ``target``. Nothing is sent and no name resolved yet.

    Raises:
        ConfigurationError: the URL cannot work, or a package is missing. No part of the URL is quoted.
    """
    url, key = secret(target.url), None if target.key is None else secret(target.key)
    if url.get_secret_value().partition(":")[0].lower() in ("http", "https"):
        if webhook is None:
            raise ConfigurationError(
                "Alerts: a webhook needs httpx. Install it: pip install 'eventtrain[alerts]'."
            )
        return webhook.Webhook(url, key=key, allow_private=target.allow_private, timeout_s=timeout_s)
    if apprise_target is None:
        raise ConfigurationError(
            "Alerts: a URL that is no http(s) needs Apprise. Install it: pip install 'eventtrain[alerts]'."
        )
    if key is not None or target.allow_private:
        raise ConfigurationError(
            "Alerts: key= and allow_private= are for webhooks, whose URL begins with https:// or http://."
        )
    return apprise_target.AppriseTarget(url, timeout_s=timeout_s)
