"""Calls Keras' own callback objects as ``Model.fit`` does, with a real model whose weight is set by hand."""

from __future__ import annotations

import functools
import os
import tempfile
import warnings
from typing import Any

import numpy as np

from benchmarks.keras_equality.cases import Case
from benchmarks.keras_equality.record import Record, bits

# Keras reads its backend once. A separate home directory: otherwise the user's keras.json would decide, for example,
# the float type, and Keras would create one if there is none.
with tempfile.TemporaryDirectory() as _home:
    os.environ |= {"KERAS_BACKEND": "jax", "KERAS_HOME": _home}
    import keras
    from keras.callbacks import CallbackList

VERSION = "3.15.1"
if keras.__version__ != VERSION:
    raise ImportError(f"The reference is keras {VERSION}, and {keras.__version__} is installed.")


@functools.cache
def model() -> Any:
    """One weight, one learning rate, and metric objects from which mode "auto" derives the direction."""
    built = keras.Sequential([keras.layers.Dense(1, use_bias=False)])
    built.compile(optimizer=keras.optimizers.SGD(0.1), loss="mse", metrics=["accuracy", "mae"])
    built.evaluate(np.zeros((1, 1)), np.zeros((1, 1)), verbose=0)  # Keras builds them at the first batch
    return built


def drive(case: Case) -> Record:
    """Returns the record of the run in Keras 3.15.1 (in the order of calls of ``keras.src.backend.jax.trainer``)."""
    subject = model()
    subject.stop_training = False
    subject.optimizer.learning_rate = case.learning_rate
    made = [getattr(keras.callbacks, policy.name)(**policy.options) for policy in case.policies]
    callbacks = CallbackList(made, model=subject)
    rates: list[int] = []
    rates_after: list[int] = []
    with warnings.catch_warnings():
        # keras/src/callbacks: a warning in every epoch without the metric.
        warnings.filterwarnings("ignore", ".* which is not available", UserWarning)
        # keras/src/backend/common/variables.py: its __array__ is older than NumPy 2.
        warnings.filterwarnings("ignore", "__array__ implementation doesn't accept", DeprecationWarning)
        callbacks.on_train_begin()
        for epoch in range(case.epochs):
            callbacks.on_epoch_begin(epoch)
            rates.append(_rate(subject))
            weight = (epoch + 1) * case.steps_per_epoch
            subject.set_weights([np.full((1, 1), weight, np.float32)])
            callbacks.on_epoch_end(epoch, case.metrics_of(epoch))
            rates_after.append(_rate(subject))
            if subject.stop_training:
                break
        callbacks.on_train_end()
        (weights,) = subject.get_weights()
    return Record(
        epochs=len(rates),
        stopped=subject.stop_training,
        rates=tuple(rates),
        rates_after=tuple(rates_after),
        policies=tuple(_memory(callback) for callback in made),
        weight=weights.item(),
        last_weight=float(len(rates) * case.steps_per_epoch),
    )


def _rate(subject: Any) -> int:
    return bits(keras.ops.convert_to_numpy(subject.optimizer.learning_rate))


def _memory(callback: Any) -> dict[str, Any]:
    match callback:
        case keras.callbacks.EarlyStopping():
            epoch = None if callback.best is None else callback.best_epoch
            return {"best": callback.best, "best_epoch": epoch, "wait": callback.wait}
        case keras.callbacks.ReduceLROnPlateau():
            return {"best": callback.best, "wait": callback.wait, "cooldown_left": callback.cooldown_counter}
        case _:
            return {}
