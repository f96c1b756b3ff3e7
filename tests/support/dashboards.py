"""A run with a dashboard, in a thread, and a client that speaks to it as the page does."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np

import eventtrain as et
from eventtrain import subscribers as subs
from tests.support.models import eval_fn, examples, new_state, step_fn

TOKEN = "a-token-for-tests-only"


def wait_until(ready: Callable[[], Any], timeout_s: float = 60.0) -> Any:
    """Returns what ``ready()`` returns, once that is true."""
    deadline_s = time.monotonic() + timeout_s
    while not (value := ready()):
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    return value


class Training:
    """Trains until it is stopped; one step takes about a millisecond."""

    def __init__(
        self, run_dir: Path, *subscribers: et.Subscriber, rate: float = 0.05, **options: Any
    ) -> None:
        self.dashboard = next(one for one in subscribers if isinstance(one, subs.Dashboard))
        self.steps: list[float] = []
        self.trainer = et.Trainer(
            step_fn, new_state(rate), eval_fn=eval_fn, subscribers=subscribers, run_dir=run_dir, **options
        )

        @self.trainer.on(et.StepsCompleted)
        async def note(event: et.StepsCompleted) -> None:
            self.steps += event.metrics["rate"].tolist()

        self._arrays = examples(32)
        self._thread = threading.Thread(target=self._run)
        self.result: Any = None

    def _batches(self, epoch: int) -> Iterator[dict[str, np.ndarray]]:
        for _ in range(100):
            time.sleep(0.001)
            yield self._arrays

    def _run(self) -> None:
        self.result = self.trainer.fit(
            self._batches, epochs=100_000, eval_data=[self._arrays], progress=False
        )

    def __enter__(self) -> Training:
        self._thread.start()
        wait_until(lambda: self.trainer.step > 0)
        return self

    def __exit__(self, *error: object) -> None:
        self.trainer.control.stop("the test is over")
        self._thread.join(60)
        assert not self._thread.is_alive()


class Client:
    """What the page does, without a browser."""

    def __init__(self, dashboard: subs.Dashboard, token: str = TOKEN) -> None:
        url = wait_until(lambda: dashboard.url).partition("#")[0]
        headers = {"Authorization": f"Bearer {token}"}
        self.http = httpx.Client(base_url=url, headers=headers, timeout=30, trust_env=False)

    def frames(self) -> Iterator[dict[str, Any]]:
        """Yields the hello and the frames."""
        with self.http.stream("GET", "/api/stream") as answer:
            assert answer.status_code == 200, answer.status_code
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    yield json.loads(line.removeprefix("data: "))

    def run_id(self) -> str:
        """Returns the run that is shown."""
        frames = self.frames()
        next(frames)
        return next(iter(next(frames)["runs"]))

    def command(self, run: str, **command: Any) -> httpx.Response:
        """Sends a command."""
        return self.http.post("/api/commands", json={"run": run, "command": command})


@contextmanager
def watched(
    run_dir: Path, dashboard: subs.Dashboard, *more: et.Subscriber
) -> Iterator[tuple[Training, Client, str]]:
    """A run in progress, a client of its dashboard, and its id."""
    try:
        with Training(run_dir, dashboard, *more) as training:
            client = Client(dashboard)
            with client.http:
                yield training, client, client.run_id()
    finally:
        dashboard.close()
