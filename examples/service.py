"""A web service that trains while it serves.

    GET  /status     step, epoch, hyperparameters and the latest metrics, at any time
    GET  /events     the run's events as they happen (server-sent events; ?kinds=epoch_completed,hyperparam_changed)
    /dashboard   a page that shows the run and steers it; the program prints its address with a token

Run it with ``python examples/service.py`` (pip install 'eventtrain[dashboard,service]') and talk to it with curl:

    curl localhost:8000/status
    curl -N localhost:8000/events?kinds=epoch_completed
    curl -H "Authorization: Bearer $DASHBOARD_TOKEN" --json \
        '{"run": "sine", "command": {"kind": "set_hyperparam", "name": "learning_rate", "value": 0.001}}' \
        localhost:8000/dashboard/api/commands

A page of another site could send requests to it through the browser of someone who can reach it. So it answers only to
the names in ``HOSTS``, GET changes nothing, and what steers the run is the dashboard's, whose guard refuses a foreign
Host or Origin, other content types, and requests without its token.
"""

import math
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import anyio
import jax
import jax.numpy as jnp
import numpy as np
import optax
import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route

import eventtrain as et
from eventtrain import subscribers as subs

KEEP_ALIVE_S = 15.0
HOSTS = ("localhost", "127.0.0.1")
SHOWN = (
    et.EpochStarted,
    et.EpochCompleted,
    et.StepsCompleted,
    et.HyperparamChanged,
    et.RunStarted,
    et.RunCompleted,
    et.RunFailed,
)
KINDS = {
    kind.model_fields["kind"].default: kind
    for kind in (*SHOWN, et.StepCompleted, et.CommandApplied, et.CommandRejected)
}


class Training:
    """One trainer, its bus, and the figures that /status shows. Everything here runs on the service's event loop."""

    def __init__(
        self, trainer: et.Trainer, fit: Callable[[et.Trainer], Any], dashboard: subs.Dashboard
    ) -> None:
        self.trainer = trainer
        self.dashboard = dashboard
        self.state = "starting"
        self.epochs_completed = 0
        self.metrics: dict[str, Any] = {}
        self._fit = fit
        self._scope = anyio.CancelScope()
        self._ended = anyio.Event()
        trainer.bus.subscribe(et.StepsCompleted, self._see_steps, queue=et.KeepLatest(), name="status")
        trainer.bus.subscribe(et.EpochCompleted, self._see_epoch, name="status of epochs")

    async def _see_steps(self, event: et.StepsCompleted) -> None:
        self.metrics.update({name: column[-1].item() for name, column in event.metrics.items()})

    async def _see_epoch(self, event: et.EpochCompleted) -> None:
        self.epochs_completed = event.epoch + 1
        self.metrics.update({name: value for name, value in event.metrics.items() if name.startswith("val_")})

    async def run(self) -> None:
        """Trains to the end. /status reports a failure, and the service stays up."""
        self.state = "training"
        try:
            with self._scope:
                result = await self._fit(self.trainer)
                self.state = f"ended: {result.stop_reason}"
        except Exception as error:  # of the data or the step too: the service reports it and stays up
            self.state = f"failed: {type(error).__name__}: {error}"
        finally:
            self._ended.set()

    async def close(self) -> None:
        """Stops at the next boundary, delivers all published events, then ends every stream. May be called again."""
        self._scope.cancel()
        await self._ended.wait()
        await self.trainer.bus.aclose()
        self.dashboard.close()

    def status(self) -> dict[str, Any]:
        return {
            "state": self.state,
            "step": self.trainer.step,
            "epochs_completed": self.epochs_completed,
            "hyperparams": dict(self.trainer.control.hyperparams),
            "metrics": {
                name: value if math.isfinite(value) else str(value) for name, value in self.metrics.items()
            },
        }


async def get_status(request: Request) -> Response:
    training: Training = request.app.state.training
    return JSONResponse(training.status())


async def get_events(request: Request) -> Response:
    training: Training = request.app.state.training
    names = request.query_params.get("kinds")
    unknown = set(names.split(",")) - KINDS.keys() if names else set()
    if unknown:
        return JSONResponse(
            {"error": f"unknown kinds {sorted(unknown)}; the known kinds are {sorted(KINDS)}"}, 422
        )
    kinds = tuple(KINDS[name] for name in names.split(",")) if names else SHOWN
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(
        _server_sent(training.trainer.bus, kinds), media_type="text/event-stream", headers=headers
    )


async def _server_sent(bus: et.EventBus, kinds: tuple[type[et.Event], ...]) -> AsyncIterator[str]:
    # A client that reads too slowly loses the oldest events; it does not hold training up.
    async with bus.stream(kinds, queue=et.DropOldest(1000), name="GET /events") as events:
        yield ": connected\n\n"
        while True:
            event = None
            with anyio.move_on_after(KEEP_ALIVE_S):
                event = await anext(events, None)
                if event is None:  # the bus was closed: the service is going down
                    return
            yield (
                f"event: {event.kind}\nid: {event.seq}\ndata: {event.model_dump_json()}\n\n"
                if event
                else ": still here\n\n"
            )


def make_app(
    make_trainer: Callable[[et.EventBus, subs.Dashboard], et.Trainer],
    fit: Callable[[et.Trainer], Any],
    dashboard: subs.Dashboard,
) -> Starlette:
    """Returns the service around a trainer. ``fit`` starts training: ``lambda t: t.fit_async(data, epochs=n)``."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with et.EventBus() as bus:
            training = app.state.training = Training(make_trainer(bus, dashboard), fit, dashboard)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(training.run)
                yield
                await training.close()

    return Starlette(
        routes=[
            Route("/status", get_status),
            Route("/events", get_events),
            Mount("/dashboard", dashboard.asgi_app(hosts=HOSTS)),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS)],
        lifespan=lifespan,
    )


class Server(uvicorn.Server):
    """Ends the event streams before uvicorn waits for open connections: GET /events never ends by itself."""

    async def shutdown(self, sockets: Any = None) -> None:
        await self.config.app.state.training.close()  # type: ignore[union-attr]
        await super().shutdown(sockets)


# --- the model: a small network that learns y = sin(3x) ------------------------------------------------------

optimiser = optax.inject_hyperparams(optax.adam)(learning_rate=1e-3)


def train_step(state: Any, batch: Any) -> tuple[Any, dict[str, jax.Array]]:
    loss, grads = jax.value_and_grad(mean_error)(state["params"], batch)
    updates, opt_state = optimiser.update(grads, state["opt_state"])
    return {"params": optax.apply_updates(state["params"], updates), "opt_state": opt_state}, {"loss": loss}


def mean_error(params: Any, batch: Any) -> jax.Array:
    x, y = batch
    hidden = jnp.tanh(x @ params["in"] + params["bias"])
    return jnp.mean((hidden @ params["out"] - y) ** 2)


def example_trainer(bus: et.EventBus, dashboard: subs.Dashboard) -> et.Trainer:
    one, two = jax.random.split(jax.random.key(0))
    params = {
        "in": jax.random.normal(one, (1, 256)),
        "bias": jnp.zeros(256),
        "out": jax.random.normal(two, (256, 1)) / 16,
    }
    state = {"params": params, "opt_state": optimiser.init(params)}
    return et.Trainer(
        train_step,
        state,
        eval_fn=lambda s, b: {"loss": mean_error(s["params"], b)},
        subscribers=[dashboard],
        bus=bus,
        run_id="sine",
    )


def example_fit(trainer: et.Trainer) -> Any:
    x = np.random.default_rng(0).uniform(-2, 2, (20_000, 1)).astype(np.float32)
    y = np.sin(3 * x)
    data = et.ArrayLoader((x[:19_000], y[:19_000]), batch_size=128)
    return trainer.fit_async(data, epochs=1000, eval_data=[(x[19_000:], y[19_000:])])


if __name__ == "__main__":
    dashboard = subs.Dashboard(None, token=os.environ.get("DASHBOARD_TOKEN"))
    app = make_app(example_trainer, example_fit, dashboard)
    print(f"Dashboard: http://127.0.0.1:8000/dashboard/#token={dashboard.token}", flush=True)
    with suppress(KeyboardInterrupt):  # uvicorn raises it again after the shutdown
        Server(uvicorn.Config(app, host="127.0.0.1", port=8000, timeout_graceful_shutdown=5)).run()
