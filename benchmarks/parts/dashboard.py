"""A run with a dashboard: its time per step over the same run without one, and how fast the page hears and is heard.

The readers are in a process of their own. Dead ones ask for the stream and never read it. The age of what a page shows
is the time from the newest step of a frame to the arrival of the next frame.
"""

from __future__ import annotations

import http.client
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from time import perf_counter, sleep, time
from typing import Any

import numpy as np

import eventtrain as et
from benchmarks.figures import Budget, Figure, Loop, absent, compared_loops, figure
from benchmarks.machine import Device
from benchmarks.workloads import Workload, calibrated
from eventtrain import subscribers as subs

TARGET_S = 0.7e-3
MILLION = 1_000_000
READERS = """
import socket, sys, time
port, token, count, reads = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4] == "read"
request = f"GET /api/stream HTTP/1.1\\r\\nHost: localhost\\r\\nAuthorization: Bearer {token}\\r\\n\\r\\n".encode()
connections = [socket.create_connection(("127.0.0.1", port)) for _ in range(count)]
for connection in connections:
    connection.sendall(request)
    connection.setblocking(False)
print("ready", flush=True)
while True:
    time.sleep(0.1)
    for connection in connections if reads else ():
        try:
            connection.recv(10_000_000)
        except BlockingIOError:
            pass
"""


@contextmanager
def readers(dashboard: subs.Dashboard, count: int, kind: str) -> Iterator[None]:
    """A process with ``count`` readers of the dashboard, which "read" or are "dead"."""
    port = (dashboard.url or "").rpartition("/#")[0].rpartition(":")[2]
    command = [sys.executable, "-c", READERS, port, dashboard.token, str(count), kind]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield
        finally:
            process.kill()


def trainer_of(workload: Workload, folder: str, *subscribers: et.Subscriber) -> et.Trainer[Any]:
    run_dir = tempfile.mkdtemp(dir=folder)
    return et.Trainer(workload.step_fn, workload.state, subscribers=subscribers, run_dir=run_dir)


def loop(trainer: et.Trainer[Any], workload: Workload) -> Loop:
    """Returns the loop that trains one epoch, timed until its last step is complete."""

    def run(steps: int) -> float:
        count = len(workload.batches)
        data = [workload.batches[index % count] for index in range(steps)]
        return trainer.fit(data, epochs=1, progress=False).history[-1].duration_s

    run(8)  # starts the server
    return run


def steering(workload: Workload, folder: str, seconds: float) -> list[Figure]:
    """Returns the time from a command to its effect, and the age of what a page shows."""
    dashboard = subs.Dashboard()
    trainer = trainer_of(workload, folder, dashboard)
    thread = threading.Thread(
        target=lambda: trainer.fit(workload.batches, steps=10**9, progress=False), daemon=True
    )
    thread.start()
    while dashboard.url is None or trainer.step < 100:
        sleep(0.01)
    port = int(dashboard.url.rpartition("/#")[0].rpartition(":")[2])
    headers = {"Authorization": f"Bearer {dashboard.token}", "Content-Type": "application/json"}
    connection = http.client.HTTPConnection("127.0.0.1", port)
    effect_ms, ages_ms = list[float](), list[float]()
    ends_s = perf_counter() + seconds / 2
    while perf_counter() < ends_s:
        command = {
            "kind": "set_hyperparam",
            "name": "learning_rate",
            "value": 1e-3 * (1 + len(effect_ms) % 2),
        }
        began_s = perf_counter()
        body = json.dumps({"run": trainer.run_id, "command": command})
        connection.request("POST", "/api/commands", body, headers)
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        answer.read()
        effect_ms.append(1e3 * (perf_counter() - began_s))
        sleep(0.11)  # the guard permits ten a second
    connection.request("GET", "/api/stream", headers=headers)
    stream = connection.getresponse()
    shown_s, ends_s = None, perf_counter() + seconds / 2
    while perf_counter() < ends_s:
        line = stream.readline()
        if not line.startswith(b'data: {"full"'):
            continue
        now_s = time()
        if shown_s is not None:
            ages_ms.append(1e3 * (now_s - shown_s))
        shown_s = next(iter(json.loads(line[6:])["runs"].values()))["status"]["updated"]
    trainer.control.stop()
    thread.join()
    dashboard.close()
    return [
        figure("command to effect", effect_ms, at=workload.name, unit="ms"),
        figure("age of what a page shows", ages_ms, at=workload.name, unit="ms"),
    ]


def first_frame() -> Figure:
    """Returns the milliseconds until a new reader has the frame of a run of a million steps with three metrics."""
    from eventtrain.subscribers.dashboard.frames import Frames, ShownRun
    from eventtrain.subscribers.dashboard.observed_run import ObservedRun

    run = ShownRun("run", ObservedRun(run_id="run"))
    values = np.random.default_rng(0).normal(size=10_000).astype(np.float32)
    for first in range(1, MILLION, len(values)):
        last = first + len(values) - 1
        metrics = dict.fromkeys(("loss", "accuracy", "grad_norm"), values)
        run.add(et.StepsCompleted(step=last, first_step=first, last_step=last, epoch=0, metrics=metrics))
    took_ms = list[float]()
    for _ in range(8):
        frames = Frames(lambda: [run])
        began_s = perf_counter()
        frames.after(None)
        took_ms.append(1e3 * (perf_counter() - began_s))
    return figure("first frame of 10^6 steps", took_ms[1:], unit="ms")


def figures(device: Device, budget_s: float, quick: bool) -> list[Figure]:
    """Returns the cost of a dashboard, and its delays."""
    logging.disable(logging.CRITICAL)
    budget, workload, found = Budget(budget_s), calibrated(TARGET_S), list[Figure]()
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
        try:
            dashboard = subs.Dashboard()
        except et.ConfigurationError as error:
            return [absent("with a dashboard", error)]
        watched = loop(trainer_of(workload, folder, dashboard), workload)
        alone = loop(trainer_of(workload, folder), workload)
        for index, (count, kind) in enumerate(((4, "read"), (100, "dead"))):
            case = f"with a dashboard and {count} readers" if kind == "read" else f"with {count} dead readers"
            with readers(dashboard, count, kind):
                share_s = budget.share(3 - index)
                found.append(
                    compared_loops(
                        case, watched, alone, workload.step_s, share_s, at=workload.name,
                        baseline="the run without a dashboard",
                    )
                )  # fmt: skip
        dashboard.close()
        found += steering(workload, folder, max(1.0, budget.share(1) - 1.5))
        found.append(first_frame())
    return found
