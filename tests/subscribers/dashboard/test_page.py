"""The page in a real browser: it steers, shows, and is of no use to other sites."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import eventtrain as et
from eventtrain import subscribers as subs
from eventtrain.subscribers.dashboard.frames import Frames
from eventtrain.subscribers.dashboard.guard import Tokens
from eventtrain.subscribers.dashboard.run_files import RunFiles
from eventtrain.subscribers.dashboard.server import serve
from tests.conftest import python_path
from tests.support.browser import browser
from tests.support.dashboards import TOKEN, wait_until, watched
from tests.support.models import batches, new_state, step_fn

SEEN = """
const shown = (id) => document.getElementById(id).textContent;
const charts = {};
for (const chart of document.querySelectorAll(".chart")) {
  charts[chart.dataset.metric] = chart.querySelector(".legend").textContent;
}
return {
  title: shown("title"), state: shown("state"), facts: shown("facts"), connection: shown("connection"), charts,
  changes: shown("changes"), commands: shown("commands"), toasts: shown("toasts"), hyperparams: shown("hyperparams"),
  subscribers: shown("subscribers"), runs: shown("runs"), alerts: shown("alerts"),
  buttons: !document.getElementById("buttons").hidden, asks: document.getElementById("token-dialog").open,
};
"""


class Page:
    """One tab."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, dashboard: subs.Dashboard | SimpleNamespace, token: str = TOKEN) -> None:
        """Opens the page in a tab that remembers nothing."""
        self.driver.get("about:blank")
        url = wait_until(lambda: dashboard.url).partition("#")[0]
        self.driver.get(url)
        self.driver.execute_script("sessionStorage.clear()")
        self.driver.get("about:blank")
        self.driver.get_log("browser")
        self.driver.get(f"{url}#token={token}")

    @property
    def seen(self) -> dict[str, Any]:
        return self.driver.execute_script(SEEN)

    def wait(self, ready: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
        """Returns what is seen once ``ready`` is true of it."""
        last: list[Any] = [None]

        def look() -> Any:
            last[0] = self.seen
            return ready(last[0])

        try:
            wait_until(look, 30)
        except AssertionError:
            raise AssertionError(f"last seen: {last[0]}; log: {self.driver.get_log('browser')}") from None
        return last[0]

    def find(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def empty_list(self, name: str) -> str:
        """What is shown for a list that has nothing in it."""
        script = f"return getComputedStyle(document.getElementById('{name}'), '::after').content"
        return self.driver.execute_script(script)

    def keys(self, text: str) -> None:
        self.find("body").send_keys(text)

    def require_quiet(self) -> None:
        """The console has no warning and no error."""
        assert self.driver.get_log("browser") == []


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    profile = tmp_path_factory.mktemp("profile")
    with browser(profile, "--host-resolver-rules=MAP rebound.example 127.0.0.1") as driver:
        yield driver


@pytest.fixture
def page(driver: Any) -> Page:
    return Page(driver)


def test_a_rate_set_on_the_page_changes_the_curve_and_pause_makes_no_step(page: Page, tmp_path: Path) -> None:
    alerts = subs.Alerts([subs.Rule("rate", above=0.2, name="<b>high</b>")])
    with watched(tmp_path / "my-run", subs.Dashboard(token=TOKEN), alerts) as (training, _, _run):
        page.open(training.dashboard)
        seen = page.wait(lambda seen: seen["state"] == "running" and "0.05" in seen["charts"].get("rate", ""))
        assert seen["title"] == "my-run"
        assert (seen["connection"], seen["buttons"]) == ("live", True)
        assert TOKEN not in page.driver.current_url
        page.find(".hp[data-name=learning_rate] input").send_keys("0.25\n")
        seen = page.wait(lambda seen: "0.25" in seen["charts"]["rate"] and seen["changes"] and seen["toasts"])
        assert "learning_rate 0.05 → 0.25" in seen["changes"]
        assert "learning_rate = 0.25: took effect at step " in seen["toasts"]
        step = int(seen["toasts"].rpartition(" ")[2].replace(",", ""))
        assert (training.steps[step - 1], training.steps[step]) == (np.float32(0.05), 0.25)
        page.wait(lambda seen: "<b>high</b>" in seen["alerts"])
        assert page.driver.find_elements("css selector", "#alerts b b") == []

        page.keys("p")
        page.wait(lambda seen: seen["state"] == "paused")
        paused_at = training.trainer.step
        time.sleep(0.3)
        assert training.trainer.step == paused_at
        page.find("#pause").click()
        page.wait(lambda seen: seen["state"] == "running")
        wait_until(lambda: training.trainer.step > paused_at)
        for key in "lbmt]]m":
            page.keys(key)
        page.wait(lambda seen: "Dashboard" in seen["subscribers"])
        page.require_quiet()


def test_a_wrong_token_shows_nothing_and_the_right_one_can_be_typed(page: Page, tmp_path: Path) -> None:
    with watched(tmp_path, subs.Dashboard(token=TOKEN)) as (training, _, _run):
        page.open(training.dashboard, "not-the-token")
        seen = page.wait(lambda seen: seen["asks"])
        assert (seen["title"], seen["charts"], seen["buttons"]) == ("waiting for a run", {}, False)
        page.find("#token-input").send_keys(TOKEN + "\n")
        page.wait(lambda seen: seen["state"] == "running")
        page.open(training.dashboard, training.dashboard.read_only_token)
        seen = page.wait(lambda seen: seen["state"] == "running")
        assert (seen["connection"], seen["buttons"]) == ("live, read-only", False)
        assert page.driver.find_elements("css selector", ".hp input") == []


ATTACK = """<!doctype html><meta charset="utf-8"><body><script>
const target = "TARGET", body = 'BODY', authorization = "Bearer TOKEN", done = [];
const post = (name, mode, headers) => fetch(target + "/api/commands", {method: "POST", mode, headers, body})
  .then((answer) => done.push(`${name} ${answer.status}`), () => done.push(`${name} refused`));
const read = fetch(target + "/api/stream", {headers: {authorization}})
  .then(() => done.push("read"), () => done.push("read refused"));
const frame = document.createElement("iframe");
frame.src = target + "/";
const framed = new Promise((resolve) => { frame.onload = resolve; setTimeout(resolve, 2000); });
document.body.append(frame);
Promise.all([
  post("text", "no-cors", {"Content-Type": "text/plain"}),
  post("json", "cors", {"Content-Type": "application/json", authorization}),
  read, framed,
]).then(() => { document.title = done.sort().join(", "); });
</script>"""


def test_a_page_of_another_site_reads_nothing_and_changes_nothing(page: Page, tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    with watched(tmp_path / "run", subs.Dashboard(token=TOKEN)) as (training, client, run):
        target = str(client.http.base_url).rstrip("/")
        body = f'{{"run": "{run}", "command": {{"kind": "set_hyperparam", "name": "learning_rate", "value": 9}}}}'
        text = ATTACK.replace("TARGET", target).replace("BODY", body).replace("TOKEN", TOKEN)
        (site / "index.html").write_text(text)
        handler = partial(SimpleHTTPRequestHandler, directory=str(site))
        with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            page.driver.get(f"http://127.0.0.1:{server.server_port}/index.html")
            title = wait_until(lambda: page.driver.title, 30)
            server.shutdown()
        assert title == "json refused, read refused, text refused"
        assert training.trainer.control.hyperparams["learning_rate"] == np.float32(0.05)
        blocked = [entry["message"] for entry in page.driver.get_log("browser")]
        assert any("frame" in message.lower() for message in blocked), blocked
        page.driver.get(f"http://rebound.example:{client.http.base_url.port}/")
        assert "this host name is not served here" in page.find("body").text


def test_a_finished_and_a_live_run_are_side_by_side(page: Page, tmp_path: Path) -> None:
    dashboard = subs.Dashboard(token=TOKEN)
    finished = et.Trainer(step_fn, new_state(), subscribers=[dashboard], run_dir=tmp_path / "finished")
    finished.fit(batches(50), epochs=1, progress=False)
    finished.close()
    with watched(tmp_path / "live", dashboard):
        page.open(dashboard)
        seen = page.wait(
            lambda seen: seen["runs"] == "finishedlive" and "live train" in seen["charts"].get("loss", "")
        )
        assert "finished train" in seen["charts"]["loss"]
        assert page.empty_list("checkpoints") == '"none"'
        assert (seen["title"], seen["state"]) == ("live", "running")
        page.keys("1")
        page.wait(lambda seen: "finished train" not in seen["charts"]["loss"])
        page.find(".run button:last-child").click()
        seen = page.wait(lambda seen: seen["title"] == "finished")
        assert (seen["state"], seen["buttons"]) == ("completed", False)
        page.require_quiet()


def test_what_a_log_does_not_have_is_not_said_to_be_none(page: Page, tmp_path: Path) -> None:
    loggers = [subs.JSONLLogger("events.jsonl"), subs.Checkpointer("checkpoints", every=10)]
    et.Trainer(step_fn, new_state(), subscribers=loggers, run_dir=tmp_path).fit(
        batches(50), epochs=1, progress=False
    )
    runs = RunFiles([tmp_path])
    serving = serve(Frames(runs.shown), None, Tokens.given(TOKEN, "the test"), "127.0.0.1", 0, lambda: False)
    try:
        page.open(SimpleNamespace(url=serving.url(TOKEN)))
        page.wait(lambda seen: seen["state"] == "completed")
        assert page.empty_list("checkpoints") == '"none in this log"'
    finally:
        runs.close()
        serving.close()


def served_run() -> None:
    """The program that is killed and started again: RUN_DIR PORT TOKEN. Prints the URL."""
    import sys

    import eventtrain as et
    from eventtrain import subscribers as subs
    from tests.support.models import batches, new_state, step_fn

    dashboard = subs.Dashboard(int(sys.argv[2]), token=sys.argv[3])
    keeper = subs.Checkpointer("checkpoints", every=100)
    trainer = et.Trainer(step_fn, new_state(), run_dir=sys.argv[1], subscribers=[dashboard, keeper])

    @trainer.on(et.RunStarted | et.RunResumed)
    async def say(event: et.Event) -> None:
        print(dashboard.url.partition("#")[0], flush=True)

    trainer.fit(batches(100), epochs=10**6, resume=True)


def test_the_page_survives_a_kill_and_a_restart_of_the_process(page: Page, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(f"{inspect.getsource(served_run)}\n\nserved_run()\n")

    def start(port: int) -> tuple[subprocess.Popen[str], str]:
        process = subprocess.Popen(
            [sys.executable, str(script), str(tmp_path / "run"), str(port), TOKEN],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": python_path(), "JAX_PLATFORMS": "cpu"},
        )
        assert process.stdout is not None
        return process, process.stdout.readline().strip()

    process, url = start(0)
    try:
        page.open(SimpleNamespace(url=url))
        page.wait(lambda seen: seen["title"] == "run" and seen["state"] == "running" and seen["charts"])
        wait_until(lambda: any((tmp_path / "run/checkpoints").glob("step-*")), 60)
        process.kill()
        process.communicate()
        page.wait(lambda seen: seen["connection"] in ("no connection", "connecting"))
        process, again = start(int(url.rstrip("/").rpartition(":")[2]))
        assert again == url
        page.wait(lambda seen: (seen["connection"], seen["state"]) == ("live", "running") and seen["charts"])
        page.driver.refresh()  # the tab still has the token
        page.wait(lambda seen: (seen["title"], seen["state"]) == ("run", "running"))
    finally:
        process.kill()
        process.communicate()


def test_an_action_a_sample_a_checkpoint_and_stop_are_buttons(page: Page, tmp_path: Path) -> None:
    dashboard = subs.Dashboard(token=TOKEN, actions={"Render": "Draws"})
    requested: list[str] = []
    sample = subs.Sample(
        lambda state: state["params"]["w"], name="weights"
    )  # made only when the button is pressed
    checkpointer = subs.Checkpointer("checkpoints", every=10**6)
    with watched(tmp_path, dashboard, checkpointer, sample) as (training, _, _run):

        @training.trainer.on(et.ActionRequested)
        async def render(event: et.ActionRequested) -> None:
            requested.append(event.name)

        page.open(dashboard)
        page.wait(lambda seen: seen["buttons"])
        page.find("#actions button").click()
        assert page.find("#samples-card").get_attribute("hidden")
        wait_until(lambda: page.find("#samplers").text == "Sample weights")
        page.find("#samplers button").click()
        page.wait(lambda seen: "sample weights" in seen["commands"])
        wait_until(lambda: re.search(r"weights step \d", page.find("#samples").text))
        page.find("#checkpoint").click()
        page.find("#evaluate").click()
        page.wait(lambda seen: "evaluate" in seen["commands"] and "checkpoint" in seen["commands"])
        wait_until(lambda: re.search(r"committed.* in .*\d s ago", page.find("#checkpoints").text, re.DOTALL))
        wait_until(lambda: requested == ["Render"])
        page.find("#stop").click()
        page.find("#stop-reason").send_keys("seen enough\n")
        page.wait(lambda seen: seen["state"] == "stopped")
        wait_until(lambda: training.result)
        assert training.result.stop_reason == "seen enough"
