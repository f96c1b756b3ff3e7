"""Watches runs over NATS with FastStream: prints alerts, and halves the learning rate of a run whose loss rises.

    pip install 'eventtrain[nats]' 'faststream[nats,cli]'
    nats-server -js &                                            # a server on this machine
    faststream run examples.watch_nats:app                       # this program; NATS_URL names another server
    python train.py                                              # a trainer with the subscriber
                                                                 #   subs.NATSEvents("nats://localhost", commands=True)

One message has up to 500 events of one run. The stream keeps them, and the durable consumer ``watch`` continues where
it was when this program starts again. A command is a request with an id of its own and a moment at which it expires;
the run answers with the step at which it took effect, or with the reason why it refused.
"""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime, timedelta
from uuid import uuid4

from faststream import FastStream
from faststream.nats import JStream, NatsBroker
from nats.js.api import DeliverPolicy

import eventtrain as et

broker = NatsBroker(os.environ.get("NATS_URL", "nats://localhost:4222"))
app = FastStream(broker)
# Made as the trainer would make it: whichever of the two comes first does.
stream = JStream("eventtrain", subjects=["eventtrain.*.events"], duplicate_window=3600)

best_loss: dict[str, float] = {}
"""run_id -> lowest loss of an epoch."""


@broker.subscriber(
    "eventtrain.*.events", stream=stream, durable="watch", deliver_policy=DeliverPolicy.NEW, pull_sub=True
)
async def watch(events: list[et.AnyEvent]) -> None:
    """Handles the events of one message, in their order."""
    for event in events:
        if isinstance(event, (et.AlertRaised, et.RunFailed)):
            print(f"{event.run_id}: {event.kind} at step {event.step}: {event}", flush=True)
        elif isinstance(event, et.EpochCompleted):
            loss = float(event.metrics["loss"])
            print(f"{event.run_id}: epoch {event.epoch} loss -> {loss:.4f}", flush=True)
            if loss > 1.1 * best_loss.setdefault(event.run_id, loss):
                await command(
                    event.run_id, {"kind": "scale_hyperparam", "name": "learning_rate", "factor": 0.5}
                )
            best_loss[event.run_id] = min(best_loss[event.run_id], loss)


async def command(run_id: str, body: dict[str, object]) -> None:
    """Sends a command to a run, and prints its answer."""
    expires = datetime.now(UTC) + timedelta(seconds=30)
    request = {"id": uuid4().hex, "expires": expires.isoformat(), "command": body}
    subject = f"eventtrain.{run_id.replace('.', '_')}.commands"
    answer = json.loads((await broker.request(request, subject, timeout=30)).body)
    if "refused" in answer:
        print(f"{run_id}: refused: {answer['refused']}", flush=True)
    else:
        print(f"{run_id}: halved the learning rate after step {answer['applied']['step']}", flush=True)
