"""A Starlette service that trains: delay of its event loop and latency of its answers, over those while idle.

The load is ``fit_async``, or the bare jitted loop in a thread of the service. A client in a process of its own sends
one request after another over one connection. The delay is how much later than asked a sleep of 5 ms ends.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tempfile
from collections.abc import Callable, Coroutine
from time import perf_counter
from typing import Any

import anyio
import anyio.to_thread
import numpy as np

import eventtrain as et
from benchmarks.figures import Budget, Figure, absent, figure
from benchmarks.machine import Device
from benchmarks.workloads import Workload, calibrated

TARGET_S = 1e-3
SLEEP_S = 0.005
CLIENT = """
import http.client, json, sys, time
connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]))
ends_s, took_ms = time.perf_counter() + float(sys.argv[2]), []
while time.perf_counter() < ends_s:
    began_s = time.perf_counter()
    connection.request("GET", "/status")
    connection.getresponse().read()
    took_ms.append(1e3 * (time.perf_counter() - began_s))
    time.sleep(0.002)
print(json.dumps(took_ms))
"""

Train = Callable[[], Coroutine[Any, Any, Any]]
"""Trains until it is cancelled."""


def client(port: int, seconds: float) -> list[float]:
    """Returns the milliseconds of each request of a client process."""
    command = [sys.executable, "-c", CLIENT, str(port), str(seconds)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


async def delays(seconds: float) -> list[float]:
    """Returns how many milliseconds too late each sleep ended."""
    found, ends_s = list[float](), perf_counter() + seconds
    while perf_counter() < ends_s:
        began_s = perf_counter()
        await anyio.sleep(SLEEP_S)
        found.append(1e3 * (perf_counter() - began_s - SLEEP_S))
    return found


async def observed(port: int, seconds: float, train: Train | None) -> dict[str, float]:
    """Returns the percentiles of delay and latency while ``train`` runs, or while the service is idle."""
    found: dict[str, list[float]] = {}
    async with anyio.create_task_group() as tasks:
        if train is not None:
            tasks.start_soon(train)
            await anyio.sleep(0.2)

        async def ask() -> None:
            found["HTTP latency"] = await anyio.to_thread.run_sync(client, port, seconds)

        async def watch() -> None:
            found["delay of the event loop"] = await delays(seconds)

        async with anyio.create_task_group() as both:
            both.start_soon(ask)
            both.start_soon(watch)
        tasks.cancel_scope.cancel()
    return {
        f"{what} p{percent}": float(np.percentile(values, percent))
        for what, values in found.items()
        for percent in (50, 99)
    }


async def served(loads: dict[str, Train], budget_s: float) -> list[Figure]:
    """Serves, and measures each load in alternating order with the idle service."""
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    async def status(_: Request) -> JSONResponse:
        return JSONResponse({"state": "training"})

    app = Starlette(routes=[Route("/status", status)])
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical"))
    budget, pairs, found = Budget(budget_s), 4, list[Figure]()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(server.serve)
        while not server.started:  # noqa: ASYNC110
            await anyio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        for index, (name, train) in enumerate(loads.items()):
            seconds = max(0.3, budget.share(len(loads) - index) / (2 * pairs + 2) - 0.3)
            halves: dict[bool, list[dict[str, float]]] = {True: [], False: []}
            for pair in range(pairs):
                for trains in (True, False) if pair % 2 else (False, True):
                    halves[trains].append(await observed(port, seconds, train if trains else None))
            for what in halves[True][0]:
                values, idle = ([one[what] for one in halves[trains]] for trains in (True, False))
                found.append(figure(what, values, idle, at=name, unit="ms", baseline="the idle service"))
        server.should_exit = True
    return found


async def fit(workload: Workload) -> None:
    """Trains with ``fit_async`` and one subscriber until it is cancelled."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = et.Trainer(workload.step_fn, workload.state, run_dir=folder)
        steps = 0

        async def count(event: et.StepCompleted) -> None:
            nonlocal steps
            steps += 1

        trainer.on(et.StepCompleted)(count)
        await trainer.fit_async(workload.batches, epochs=10**6)


async def bare(workload: Workload) -> None:
    """Runs the bare jitted loop in a thread, in short pieces, until it is cancelled."""
    while True:
        await anyio.to_thread.run_sync(workload.bare_loop, 100)


def figures(device: Device, budget_s: float, quick: bool) -> list[Figure]:
    """Returns delay and latency of a service that trains, over those of the idle one."""
    logging.disable(logging.CRITICAL)
    budget, workload = Budget(budget_s), calibrated(TARGET_S)

    def load(train: Callable[[Workload], Coroutine[Any, Any, Any]]) -> Train:
        return lambda: train(workload)

    loads = {"fit_async": load(fit), "bare loop in a thread": load(bare)}
    try:
        return anyio.run(served, loads, budget.share(1) - 1.0)
    except ImportError as error:
        return [absent("HTTP latency", f"not installed: {error}")]
