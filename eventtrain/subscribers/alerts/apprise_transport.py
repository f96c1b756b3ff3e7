"""``AppriseTransport``: alerts through one of the services that Apprise knows, chosen by the URL. Requires Apprise."""

from __future__ import annotations

import html
from typing import Any

import apprise
from apprise.attachment.file import AttachFile
from pydantic import SecretStr

from eventtrain.errors import ConfigurationError, did_you_mean
from eventtrain.subscribers._shared.log_filter import quiet_libraries
from eventtrain.subscribers.alerts.message import Message, NotDelivered

KINDS = {
    "critical": apprise.NotifyType.FAILURE,
    "warning": apprise.NotifyType.WARNING,
    "info": apprise.NotifyType.INFO,
    None: apprise.NotifyType.SUCCESS,
}


class AppriseTransport:
    """A URL of Apprise.

    Its plugin is called directly and not through ``Apprise.notify``, which would use threads of its own, whose log
    lines could not be suppressed. Redirects are not followed. The URL is in no message, log or repr; neither is it in
    the ConfigurationError for an incomplete URL or an unknown service.
    """

    def __init__(self, url: SecretStr, *, timeout_s: float = 5.0) -> None:
        with quiet_libraries():
            asset: Any = apprise.AppriseAsset(app_id="eventtrain", app_desc="eventtrain", secure_logging=True)
            asset.http_redirects = False
            try:
                plugin: Any = apprise.Apprise.instantiate(url.get_secret_value(), asset=asset)
            except Exception:  # its text may quote the URL
                plugin = None
        if plugin is None:
            raise ConfigurationError(_problem(url.get_secret_value()))
        plugin.redirects = False  # also where the URL itself asks for them
        plugin.socket_connect_timeout = plugin.socket_read_timeout = timeout_s
        if plugin.overflow_mode == apprise.OverflowMode.UPSTREAM:  # what is too long would be refused
            plugin.overflow_mode = apprise.OverflowMode.SPLIT
        self._plugin = plugin

    def __repr__(self) -> str:
        return "AppriseTransport(...)"

    def send(self, message: Message) -> None:
        """Passes ``message`` to the service. Blocks; one thread at a time. Raises NotDelivered."""
        files = apprise.AppriseAttachment()
        with quiet_libraries():
            for path in message.attach:
                files.add(AttachFile(path=str(path)))
            title, body, written_as = self._in_its_format(message.title, message.text)
            taken = self._plugin.notify(
                title=title,
                body=body,
                notify_type=KINDS[message.severity],
                body_format=written_as,
                attach=files if message.attach else None,
            )
        if not taken:
            raise NotDelivered("Apprise reported a failure", may_pass=True)

    def _in_its_format(self, title: str, body: str) -> tuple[str, str, Any]:
        """Returns title and body, as HTML if the service sends that, and the format that Apprise must take them for.

        A plugin that is called directly would send text unchanged, or drop what looks like a tag.
        """
        plugin, text, markup = self._plugin, apprise.NotifyFormat.TEXT, apprise.NotifyFormat.HTML
        resolve: Any = getattr(plugin, "resolve_format", None)  # since Apprise 2
        if (plugin.notify_format if resolve is None else resolve(text)) != markup:
            return title, body, text
        if plugin.title_maxlen <= 0:  # it becomes part of the body
            title = html.escape(title, quote=False)
        body = html.escape(body, quote=False).replace("\n", "<br />\n")
        return title, body, text if resolve is None else markup


def _problem(url: str) -> str:
    scheme, colon, _ = url.partition("://")
    with quiet_libraries():
        known = sorted(apprise.NotificationManager().schemas())
    if colon and scheme.lower() in known:
        return (
            f"Alerts: this {scheme.lower()}:// URL is incomplete, or requires a package that is not installed. It is "
            "not shown: it may hold secrets. Apprise's page on the service says what it requires."
        )
    hint = did_you_mean(f"{scheme.lower()}://", [f"{name}://" for name in known]) if colon else ""
    return (
        f"Alerts: Apprise has no service for a URL of this kind. {hint}".rstrip() + " Give a URL such as "
        "https://host/path for a webhook, or slack://..., mailto://... for Apprise. The one given is not shown: it may "
        "hold secrets."
    )
