"""A FastAPI service that trains a model and answers with it meanwhile.

    pip install 'eventtrain[dashboard]' fastapi scikit-learn
    uvicorn --app-dir examples fastapi_service:app

    POST /predict    classifies images with the weights of the last epoch that has ended
    GET  /status     step, epoch, state of the run, at any time
    GET  /events     the epochs as they end (server-sent events)
    /dashboard       shows and steers the run; its address with the token is in the log

    curl --json '{"images": [[0, 0, 5, 13, 9, ...]]}' localhost:8000/predict       # 64 numbers from 0 to 16 an image

A service that is terminated saves the run, and the next process continues it. It answers only to the names in
``HOSTS``. What changes the run is the dashboard's, which refuses a foreign Host or Origin and requests without its
token.
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Annotated, Any

import anyio
import jax
import jax.numpy as jnp
import numpy as np
import optax
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field
from sklearn.datasets import load_digits
from starlette.middleware.trustedhost import TrustedHostMiddleware

import eventtrain as et
from eventtrain import subscribers as subs

HOSTS = ("localhost", "127.0.0.1")
EPOCHS = int(os.environ.get("EPOCHS", "5000"))
optimiser = optax.inject_hyperparams(optax.adam)(learning_rate=1e-3)


def metrics_of(params: Any, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    images, labels = batch
    logits = jax.nn.relu(images @ params["hidden"]) @ params["out"]
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return loss, {"loss": loss, "accuracy": jnp.mean(logits.argmax(-1) == labels)}


def train_step(state: Any, batch: Any) -> tuple[Any, dict[str, jax.Array]]:
    grads, metrics = jax.grad(metrics_of, has_aux=True)(state["params"], batch)
    updates, opt_state = optimiser.update(grads, state["opt_state"])
    return {"params": optax.apply_updates(state["params"], updates), "opt_state": opt_state}, metrics


class Training:
    """The run, and the weights that requests are answered with."""

    def __init__(self, bus: et.EventBus, dashboard: subs.Dashboard) -> None:
        one, two = jax.random.split(jax.random.key(0))
        params = {
            "hidden": jax.random.normal(one, (64, 128)) / 8,
            "out": jax.random.normal(two, (128, 10)) / 11,
        }
        self.weights: tuple[dict[str, np.ndarray], int] | None = None  # and the step that they are of
        self.epochs_completed = 0
        self.state = "training"
        self.trainer = et.Trainer(
            train_step,
            {"params": params, "opt_state": optimiser.init(params)},
            eval_fn=lambda state, batch: metrics_of(state["params"], batch)[1],
            subscribers=[subs.Checkpointer("checkpoints", every_epochs=20), dashboard],
            bus=bus,
            run_dir="runs/fastapi",
            run_id="digits",
        )
        # If epochs end faster than weights are copied, the newest is enough.
        self.trainer.on(et.EpochCompleted, queue=et.KeepLatest(), name="weights")(self._take_weights)

    async def _take_weights(self, event: et.EpochCompleted, control: et.Control) -> None:
        self.epochs_completed = event.epoch + 1
        with suppress(et.CommandRejectedError):  # the run has ended: run() takes its last weights
            await control.snapshot("weights").result()
            kept = control.snapshots["weights"]
            state: Any = await kept.to_host()
            self.weights = state["params"], kept.step
            kept.release()

    async def run(self) -> None:
        digits = load_digits()
        images, labels = (digits.data / 16).astype(np.float32), digits.target.astype(np.int32)
        data, val_data = et.ArrayLoader((images[:1400], labels[:1400]), 50), [(images[1400:], labels[1400:])]
        try:
            result = await self.trainer.fit_async(data, epochs=EPOCHS, eval_data=val_data, resume=True)
        except Exception as error:  # the service stays up and reports it
            self.state = f"failed: {type(error).__name__}: {error}"
        else:
            self.state = f"ended: {result.stop_reason}"
            self.weights = jax.device_get(result.state["params"]), result.step


dashboard = subs.Dashboard(None, token=os.environ.get("DASHBOARD_TOKEN"))


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with et.EventBus() as bus, anyio.create_task_group() as tasks:
        app.state.training = training = Training(bus, dashboard)
        tasks.start_soon(training.run)
        print(f"Dashboard: http://127.0.0.1:8000/dashboard/#token={dashboard.token}", flush=True)
        yield
        training.trainer.control.stop(
            "preempted"
        )  # a Checkpointer saves the run; the next process resumes it
        dashboard.close()


app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None)  # these pages load scripts of another site
app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(HOSTS))
app.mount("/dashboard", dashboard.asgi_app(hosts=HOSTS))

Image = Annotated[list[Annotated[float, Field(ge=0, le=16)]], Field(min_length=64, max_length=64)]


class Images(BaseModel):
    images: Annotated[list[Image], Field(min_length=1, max_length=256)]


class Predictions(BaseModel):
    digits: list[int]
    step: int


@app.post("/predict")
def predict(given: Images, request: Request) -> Predictions:
    """Runs in a thread, and in NumPy, so that it neither compiles nor waits for the device that trains."""
    training: Training = request.app.state.training
    if training.weights is None:
        raise HTTPException(503, "the first epoch has not ended", headers={"Retry-After": "1"})
    weights, step = training.weights
    hidden = np.maximum(np.asarray(given.images) / 16 @ weights["hidden"], 0)
    return Predictions(digits=(hidden @ weights["out"]).argmax(-1).tolist(), step=step)


@app.get("/status")
async def status(request: Request) -> dict[str, Any]:
    training: Training = request.app.state.training
    return {
        "state": training.state,
        "step": training.trainer.step,
        "epochs_completed": training.epochs_completed,
        "hyperparams": dict(training.trainer.control.hyperparams),
    }


@app.get("/events")
async def events(request: Request) -> StreamingResponse:
    bus = request.app.state.training.trainer.bus

    async def lines() -> AsyncIterator[str]:
        # A client that reads too slowly loses events and delays nothing. The stream ends when the server is stopped.
        async with bus.stream(et.EpochCompleted, et.RunCompleted, queue=et.DropOldest(100)) as stream:
            async for event in stream:
                yield f"event: {event.kind}\ndata: {event.model_dump_json()}\n\n"

    return StreamingResponse(lines(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})
