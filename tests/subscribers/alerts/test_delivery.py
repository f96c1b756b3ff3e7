"""Alerts of real runs on their way to real servers, good and bad; and secrets, which are shown nowhere."""

from __future__ import annotations

import html
import json
import logging
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from time import monotonic
from types import SimpleNamespace
from typing import Any

import anyio
import jax.numpy as jnp
import numpy as np
import pytest
from pydantic import SecretStr

import eventtrain as et
from eventtrain import subscribers as subs
from eventtrain.subscribers.alerts import target as alert_target
from eventtrain.subscribers.alerts.apprise_transport import AppriseTransport
from eventtrain.subscribers.alerts.message import Message
from eventtrain.validation.optional_imports import MissingModule
from tests.subscribers.alerts.alert_servers import MailServer, Target, free_port, serving, silent_server

# Apprise's mail plugin looks for it on Python below 3.13.
pytestmark = pytest.mark.filterwarnings("ignore:'imghdr' is deprecated:DeprecationWarning")

SECRET = "s3cr3t-t0ken"
RULE = subs.Rule("loss", above=1.0, event=et.StepCompleted)


@pytest.fixture
def target() -> Iterator[Target]:
    with serving(Target(says=f"because {SECRET}")) as target:
        yield target


@pytest.fixture
def mail() -> Iterator[MailServer]:
    server = MailServer()
    server.start()
    yield server
    server.stop()


def step(state: Any, batch: Any) -> Any:
    return state, {"loss": batch}


def fit(tmp_path: Path, alerts: subs.Alerts, losses: list[float], *others: et.Subscriber) -> list[et.Event]:
    """Everything that is said of alerts."""
    trainer = et.Trainer(step, {"w": jnp.zeros(1)}, subscribers=[*others, alerts], run_dir=tmp_path)
    seen: list[et.Event] = []

    @trainer.on(et.AlertRaised | et.AlertResolved | et.SubscriberFailed)
    async def see(event: et.Event) -> None:
        seen.append(event)

    trainer.fit([np.float32(loss) for loss in losses], epochs=1)
    return seen


def mailto(port: int, **more: str) -> str:
    query = "&".join(
        f"{key}={value}" for key, value in {"to": "a@host.test", "from": "b@host.test", **more}.items()
    )
    return f"mailto://127.0.0.1:{port}?{query}"


def letters(run_dir: Path, name: str = "alerts.dead.jsonl") -> list[dict[str, Any]]:
    path = run_dir / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# --- what arrives ---------------------------------------------------------------------------------------------


def test_a_webhook_gets_the_stamped_events_in_their_order(tmp_path: Path, target: Target) -> None:
    alerts = subs.Alerts([RULE], f"{target.url}/hook", allow_private=True, key="key")
    seen = fit(tmp_path, alerts, [2.0, 0.5, 3.0])
    assert [et.parse_event(event) for event in target.events] == seen
    assert all(event["seq"] > 0 and event["run_id"] for event in target.events)
    assert len(target.bodies) == 1
    assert target.headers[0]["X-Eventtrain-Signature"].startswith("sha256=")
    assert letters(tmp_path) == []


def test_a_mail_says_what_happened_and_carries_the_report(tmp_path: Path, mail: MailServer) -> None:
    class Report(et.Subscriber):
        async def on_run_completed(self, event: et.RunCompleted) -> None: ...

        async def stop(self) -> None:
            await anyio.Path(tmp_path / "report.html").write_text("<h1>Report</h1>")

    alerts = subs.Alerts(
        [RULE, subs.RunCompletedRule()], mailto(mail.port), label="mail", attach=["report.html"], group_s=60.0
    )
    fit(tmp_path, alerts, [2.0], Report())
    (only,) = mail.mails
    assert (only["to"], only["subject"]) == ("a@host.test", "2 alerts (warning)")
    body = only.get_body()
    assert body is not None
    assert "[warning] loss above 1: loss = 2 at step 1 is above 1" in body.get_content()
    assert "[info] run completed: after step 1: completed" in body.get_content()
    (attachment,) = only.iter_attachments()
    assert attachment.get_filename() == "report.html"
    assert "<h1>Report</h1>" in str(attachment.get_content())
    assert letters(tmp_path) == []


@pytest.mark.parametrize("fails", [False, True])
def test_the_mail_about_the_end_carries_the_report_that_the_run_wrote(
    tmp_path: Path, mail: MailServer, fails: bool
) -> None:
    rules = [subs.RunCompletedRule(), subs.RunFailedRule()]
    alerts = subs.Alerts(rules, mailto(mail.port), attach=["report.html"])
    losses = [np.float32(2.0), *([np.zeros(2, np.float32)] if fails else [])]  # of another shape
    trainer = et.Trainer(
        step,
        {"w": jnp.zeros(1)},
        subscribers=[subs.Report(), alerts],
        run_dir=tmp_path,
        run_id="run-of-today",
    )
    with pytest.raises(et.EventTrainError) if fails else nullcontext():
        trainer.fit(losses, epochs=1)
    (only,) = mail.mails
    assert ("run failed" if fails else "run completed") in only["subject"]
    (attachment,) = only.iter_attachments()
    assert (attachment.get_filename(), attachment.get_content_type()) == ("report.html", "text/html")
    content = attachment.get_payload(decode=True)
    assert isinstance(content, bytes)
    assert content.split() == (tmp_path / "report.html").read_bytes().split()  # mail has line ends of its own
    assert b"run-of-today" in content


def test_alerts_in_front_of_the_report_say_that_it_is_missing_or_of_an_earlier_run(
    tmp_path: Path, mail: MailServer, caplog: pytest.LogCaptureFixture
) -> None:
    sent: list[int] = []
    for said in (
        "report.html is not in run_dir",
        "report.html was not written by this run; the old file is sent",
    ):
        alerts = subs.Alerts([subs.RunCompletedRule()], mailto(mail.port), attach=["report.html"])
        caplog.clear()
        et.Trainer(step, {"w": jnp.zeros(1)}, subscribers=[alerts, subs.Report()], run_dir=tmp_path).fit(
            [np.float32(2.0)], epochs=1
        )
        assert said in caplog.text
        assert "List Alerts after the subscriber that writes it." in caplog.text
        sent.append(len(list(mail.mails[-1].iter_attachments())))
    assert sent == [0, 1]


def test_a_mail_has_the_lines_and_angle_brackets_of_what_happened(mail: MailServer) -> None:
    alert = et.AlertRaised(name="x", message="TypeError: '<' and <class 'int'> & more\nsecond line")
    AppriseTransport(SecretStr(mailto(mail.port))).send(Message((alert,)))
    (only,) = mail.mails
    for part in [part for part in only.walk() if not part.is_multipart()]:
        shown = part.get_content()
        if part.get_content_subtype() == "html":
            shown = html.unescape(re.sub("<br ?/?>", "\n", shown))
            assert re.search(r"more\s+second line", shown)
            assert "&lt;class" in part.get_content()
            assert "<br" in part.get_content()
        else:
            assert "<class 'int'> & more" in shown


def test_angle_brackets_reach_a_service_that_sends_html(monkeypatch: pytest.MonkeyPatch) -> None:
    telegram = AppriseTransport(SecretStr("tgram://123456789:abcdefg_hijklmnop/12315544/"))
    posted: list[str] = []

    def post(url: str, data: str, **others: Any) -> Any:
        posted.append(json.loads(data)["text"])
        return SimpleNamespace(status_code=200, content=b"{}")

    monkeypatch.setattr("requests.post", post)
    monkeypatch.setattr(
        "requests.Session.post", lambda self, url, **others: post(url, **others), raising=False
    )
    text = "'<' and <class 'int'> & more\nsecond line"
    telegram.send(Message((et.AlertRaised(name="x", message=text),)))
    (shown,) = posted
    assert shown.split() == f"<b>[warning] x</b> {html.escape(text, quote=False)}".split()
    assert "more\r\nsecond" in shown


def test_more_than_a_service_takes_goes_in_several_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    hook = AppriseTransport(SecretStr("discord://4174216298/abcdefghijklmnopqrst"))
    sent: list[str] = []
    monkeypatch.setattr(hook._plugin, "send", lambda body, **others: sent.append(body) or True)
    hook.send(Message([et.AlertRaised(name=str(n), message="m" * 900) for n in range(5)]))
    assert len(sent) > 1
    assert max(map(len, sent)) <= 2000
    assert "".join(sent).count("m" * 900) + sum(text.count("m") for text in sent) >= 5 * 900


def test_half_a_surrogate_pair_in_an_error_costs_no_alert(tmp_path: Path, target: Target) -> None:
    def losses() -> Iterator[np.float32]:
        yield np.float32(2)
        raise ValueError("\udcff is no number")

    alerts = subs.Alerts([subs.RunFailedRule()], f"{target.url}/hook", allow_private=True)
    trainer = et.Trainer(step, {"w": jnp.zeros(1)}, subscribers=[alerts], run_dir=tmp_path)
    with pytest.raises(ValueError, match="is no number"):
        trainer.fit(lambda epoch: losses(), epochs=1)
    (event,) = target.events
    assert event["message"] == r"after step 1: ValueError: \udcff is no number"


def test_apprise_speaks_http_to_a_service(tmp_path: Path, target: Target) -> None:
    alerts = subs.Alerts([RULE], f"json://127.0.0.1:{target.port}/x", label="team")
    target.__dict__["bodies"] = bodies = []
    fit(tmp_path, alerts, [2.0])
    (body,) = bodies
    assert (body["title"], body["type"]) == ("[warning] loss above 1", "warning")
    assert body["message"].startswith("loss = 2 at step 1 is above 1\nRun ")


async def test_several_targets_are_told_each_in_its_own_time(tmp_path: Path, target: Target) -> None:
    with silent_server() as port:
        alerts = subs.Alerts(
            [RULE],
            targets=[
                subs.AlertTarget(f"http://127.0.0.1:{port}/{SECRET}", "silent", allow_private=True),
                subs.AlertTarget(target.url, "fine", allow_private=True),
            ],
            group_s=0.0, timeout_s=60.0, finish_timeout_s=0.5,
        )  # fmt: skip
        trainer = et.Trainer(step, {"w": jnp.zeros(1)}, subscribers=[alerts], run_dir=tmp_path)
        with anyio.fail_after(60):
            await trainer.fit_async([np.float32(2)], epochs=1)
    assert [event["kind"] for event in target.events] == ["alert_raised"]
    assert [letter["label"] for letter in letters(tmp_path)] == ["silent"]


# --- what does not --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("statuses", "tries", "said"),
    [
        ([503, 429], 3, ""),
        ([404], 1, "HTTP status 404, at attempt 1"),
        ([302], 1, "HTTP status 302; redirects are not followed, at attempt 1"),
        ([500, 500, 500], 3, "HTTP status 500, at attempt 3"),
    ],
)
def test_what_a_webhook_refuses_is_tried_again_or_said_and_kept(
    tmp_path: Path, target: Target, statuses: list[int], tries: int, said: str
) -> None:
    target.statuses = statuses
    alerts = subs.Alerts(
        [RULE], f"{target.url}/{SECRET}", label="ops", allow_private=True, retries=2, retry_delay_s=0.01
    )
    seen = fit(tmp_path, alerts, [2.0])
    assert len(target.bodies) == tries
    if not said:
        assert len(seen) == 1
        assert letters(tmp_path) == []
        return
    raised, failed = seen
    assert isinstance(failed, et.SubscriberFailed)
    assert (failed.subscriber, failed.event_kind) == ("Alerts", "alert_raised")
    assert failed.error == f"1 alerts not delivered to ops: {said}"
    (letter,) = letters(tmp_path)
    assert (letter["label"], letter["reason"]) == ("ops", said)
    assert et.parse_event(letter["event"]) == raised


@pytest.mark.parametrize("status", [302, 500])
def test_what_an_apprise_service_refuses_is_kept_and_redirects_are_not_followed(
    tmp_path: Path, target: Target, status: int
) -> None:
    target.statuses = [status] * 2
    url = f"json://127.0.0.1:{target.port}/{SECRET}?redirect=yes"
    alerts = subs.Alerts([RULE], url, label="team", retries=1, retry_delay_s=0.01)
    fit(tmp_path, alerts, [2.0])
    assert len(target.bodies) == 2
    assert [letter["reason"] for letter in letters(tmp_path)] == ["Apprise reported a failure, at attempt 2"]


def test_a_mail_server_that_refuses_or_is_dead_is_told(tmp_path: Path, mail: MailServer) -> None:
    mail.answer = f"554 no, {SECRET}"
    alerts = subs.Alerts(
        [RULE],
        targets=[
            subs.AlertTarget(mailto(mail.port), "refuses"),
            subs.AlertTarget(mailto(free_port()), "dead"),
        ],
        retries=0,
    )
    fit(tmp_path, alerts, [2.0])
    assert sorted(letter["label"] for letter in letters(tmp_path)) == ["dead", "refuses"]
    assert mail.mails == []


@pytest.mark.parametrize("kind", ["webhook", "mail", "apprise"])
def test_a_target_that_never_answers_delays_no_step_and_the_end_no_longer_than_said(
    tmp_path: Path, kind: str
) -> None:
    with silent_server() as port:
        url = {
            "webhook": f"http://127.0.0.1:{port}/{SECRET}",
            "mail": mailto(port),
            "apprise": f"json://127.0.0.1:{port}/{SECRET}",
        }[kind]
        alerts = subs.Alerts(
            [RULE], url, label="silent", allow_private=kind == "webhook", timeout_s=60.0, finish_timeout_s=0.3
        )
        trainer = et.Trainer(step, {"w": jnp.zeros(1)}, subscribers=[alerts], run_dir=tmp_path)
        ended: list[float] = []

        @trainer.on(et.RunCompleted)
        async def note(event: et.RunCompleted) -> None:
            ended.append(monotonic())

        result = trainer.fit([np.float32(index % 2 * 2) for index in range(300)], epochs=1)
        waited_s = monotonic() - ended[0]
    assert result.step == 300
    assert waited_s < 30  # and not the minute that the target takes
    rows = letters(tmp_path)
    assert [row["event"]["step"] for row in rows] == list(range(2, 301))
    assert {row["reason"] for row in rows} == {"out of time at the end of the run"}


def test_a_slow_target_delays_no_step(tmp_path: Path, target: Target) -> None:
    target.hold.clear()
    bodies_at_the_last_step: list[int] = []
    alerts = subs.Alerts([RULE], target.url, allow_private=True, group_s=0.0, timeout_s=60.0)
    trainer = et.Trainer(step, {"w": jnp.zeros(1)}, subscribers=[alerts], run_dir=tmp_path)

    @trainer.on(et.StepCompleted, lag=0, where=lambda event: event.step == 200)
    async def last(event: et.StepCompleted) -> None:
        bodies_at_the_last_step.append(len(target.bodies))
        target.hold.set()

    trainer.fit([np.float32(2)] * 200, epochs=1)
    assert bodies_at_the_last_step in ([0], [1])
    assert len(target.bodies) == 1


async def test_a_run_whose_drain_timeout_is_shorter_keeps_what_was_not_delivered(tmp_path: Path) -> None:
    with silent_server() as port:
        alerts = subs.Alerts(
            [RULE], f"http://127.0.0.1:{port}/", allow_private=True, timeout_s=60, finish_timeout_s=60
        )
        trainer = et.Trainer(
            step, {"w": jnp.zeros(1)}, subscribers=[alerts], run_dir=tmp_path, drain_timeout_s=0.5
        )
        began = monotonic()
        await trainer.fit_async([np.float32(2)], epochs=1)
    assert monotonic() - began < 40
    assert len(letters(tmp_path)) == 1


# --- what cannot work -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "said"),
    [
        (f"slak://{SECRET}", "has no service for a URL of this kind. Did you mean 'slack://'?"),
        (f"{SECRET}", "has no service for a URL"),
        (f"xyzzyxyzzy://{SECRET}", "has no service for a URL"),
        (f"slack://{SECRET}", "this slack:// URL is incomplete"),
        (f"ftp://{SECRET}/", "has no service for a URL"),
        (f"http://[{SECRET}", "must be a URL such as https://host/path"),
        (f"http://10.0.0.1/{SECRET}", "private, loopback or link-local"),
    ],
)
def test_a_url_that_cannot_work_is_refused_without_quoting_it(
    url: str, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with pytest.raises(et.ConfigurationError) as caught:
        subs.Alerts([RULE], url)
    assert said in str(caught.value)
    assert SECRET not in str(caught.value) + caplog.text + repr(caught.value.__context__)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"url": "json://h", "key": SECRET}, "key= and allow_private= are for webhooks"),
        ({"targets": [subs.AlertTarget("json://h"), subs.AlertTarget("json://g")]}, "the same label"),
        ({"url": "https://h", "key": b"s3cr3t-t0ken"}, "key= must be text"),
        ({"url": "https://h", "key": ""}, "key= is empty"),
        ({"url": ["https://h/s3cr3t-t0ken"]}, "url= must be text"),
        ({"attach": ["../report.html"]}, "leads out of run_dir"),
        ({"dead_letters": "../x"}, "leads out of run_dir"),
        ({"timeout_s": 0}, "timeout_s=0"),
        ({"retries": -1}, "retries=-1"),
        ({"group_s": -1}, "group_s=-1"),
    ],
)
def test_arguments_that_cannot_work_are_refused_by_name(options: dict[str, Any], said: str) -> None:
    with pytest.raises(et.ConfigurationError) as caught:
        subs.Alerts([RULE], **options)
    assert said in str(caught.value)
    assert SECRET not in str(caught.value)


def test_a_missing_package_is_told_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("webhook", "apprise_transport"):
        missing = MissingModule(ModuleNotFoundError("No module named 'x'"), "alerts", module)
        monkeypatch.setattr(alert_target, module, missing)
    for url, module in ((f"https://host/{SECRET}", "webhook"), (f"slack://{SECRET}", "apprise_transport")):
        with pytest.raises(et.ConfigurationError, match=r"pip install 'eventtrain\[alerts\]'") as caught:
            subs.Alerts([RULE], url)
        assert module in str(caught.value)
        assert SECRET not in str(caught.value)
    subs.Alerts([RULE])


# --- secrets --------------------------------------------------------------------------------------------------

PLACES = {
    "query": "http://127.0.0.1:{port}/x?key={secret}",
    "path": "http://127.0.0.1:{port}/{secret}/y",
    "userinfo": "http://{secret}:{secret}@127.0.0.1:{port}/",
    "host": "http://{secret}.invalid/",
    "key": "http://127.0.0.1:{port}/",
    "apprise query": "json://127.0.0.1:{port}/?:key={secret}&-note={secret}",
    "apprise path": "json://127.0.0.1:{port}/{secret}/y",
    "apprise header": "json://127.0.0.1:{port}/y?+X-Key={secret}",
    "apprise userinfo": "json://{secret}:{secret}@127.0.0.1:{port}/",
    "apprise host": "json://{secret}.invalid/",
    "discord": "discord://4174216298/{secret}",
    "telegram": "tgram://123456789:{secret}_abcdefghijklmnopqrstuvw/12315544/",
    "dead": "http://127.0.0.1:{dead}/{secret}",
    "apprise dead": "json://127.0.0.1:{dead}/{secret}",
    "mail": "mailto://{secret}:{secret}@127.0.0.1:{dead}?to=a@host.test&from=b@host.test",
}
NOISY = ("apprise", "httpcore", "httpx", "requests", "urllib3", "eventtrain")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("status", [200, 302, 500])
def test_the_secret_is_shown_nowhere(
    tmp_path: Path,
    target: Target,
    place: str,
    status: int,
    caplog: pytest.LogCaptureFixture,
    capfd: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if (
        place in ("discord", "telegram", "dead", "host", "mail", "apprise dead", "apprise host")
        and status != 200
    ):
        pytest.skip("nobody answers there")
    monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{free_port()}")  # nothing leaves this machine
    for name in NOISY:
        caplog.set_level(logging.DEBUG, name)
    caplog.set_level(logging.DEBUG)
    target.statuses = [status] * 2
    url = PLACES[place].format(port=target.port, dead=free_port(), secret=SECRET)
    webhook = url.startswith("http")
    alerts = subs.Alerts(
        [RULE],
        url,
        key=SECRET if webhook else None,
        allow_private=webhook,
        retries=0 if place == "mail" else 1,  # Apprise waits some seconds between two mails
        retry_delay_s=0.01,
        timeout_s=2,
    )
    config = subs.AlertTarget(url, key=SECRET)
    seen = fit(tmp_path, alerts, [2.0], subs.JSONLLogger("all.jsonl", et.Event))
    shown = [
        repr(alerts),
        str(vars(alerts)),
        repr(config),
        repr(alerts.state_dict()),
        caplog.text,
        *capfd.readouterr(),
    ]
    shown += [repr(vars(transport)) for _, transport in alerts._delivery_options.targets]
    shown += [event.model_dump_json() for event in seen]
    shown += [record.exc_text or "" for record in caplog.records]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert tmp_path / "all.jsonl" in files
    shown += [path.read_text() for path in files]
    assert not [text for text in shown if SECRET in text]
    reached = bool(target.bodies)
    assert reached == ("{port}" in PLACES[place])
    if not reached or status != 200:
        assert "not delivered to target" in caplog.text
        assert len(letters(tmp_path)) == 1


FIRST = """
import logging, sys, httpx
from pydantic import SecretStr
from eventtrain import AlertRaised
from eventtrain.subscribers.alerts.message import Message
from eventtrain.subscribers.alerts.webhook import Webhook

logging.basicConfig(level=logging.DEBUG, stream=sys.stdout)
alert = AlertRaised(run_id="r", seq=1, step=1, name="n", severity="info", message="m")
Webhook(SecretStr(sys.argv[1]), allow_private=True).send(Message((alert,)))
print("sent")
"""


def test_the_first_message_of_a_process_shows_no_secret_either(target: Target) -> None:
    """httpx imports its transport, and so makes loggers, when it is first used."""
    url = f"{target.url}/{SECRET}?key={SECRET}"
    done = subprocess.run([sys.executable, "-c", FIRST, url], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "sent" in done.stdout
    assert len(target.bodies) == 1
    assert SECRET not in done.stdout + done.stderr


def test_the_positive_control_shows_what_the_libraries_would_have_logged(
    target: Target, caplog: pytest.LogCaptureFixture
) -> None:
    import apprise
    import httpx

    caplog.set_level(logging.DEBUG)
    subs.Alerts(
        [RULE], target.url, allow_private=True
    )  # the filter is in place, and silences its own threads only
    with httpx.Client(trust_env=False) as client:
        client.post(f"{target.url}/{SECRET}", json={})
    assert SECRET in caplog.text
    caplog.clear()
    plugin = apprise.Apprise.instantiate(f"json://127.0.0.1:{target.port}/{SECRET}")
    assert plugin is not None
    done = threading.Event()
    thread = threading.Thread(target=lambda: (plugin.notify(body="x"), done.set()))
    thread.start()
    thread.join(60)
    assert done.is_set()
    assert SECRET in caplog.text
