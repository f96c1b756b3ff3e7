"""``StepTable``: the steps of a window by columns, and how files write them without an event for each step. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain, repeat
from typing import Any

import numpy as np
from pydantic_core import to_json

from eventtrain.events import StepCompleted, StepsCompleted


@dataclass(frozen=True, slots=True)
class StepTable:
    """Some steps of one epoch: their numbers, and one read-only array of that length for each metric."""

    steps: range
    epoch: int
    batches: range
    metrics: Mapping[str, np.ndarray[Any, Any]]
    window: StepsCompleted

    @classmethod
    def of(cls, window: StepsCompleted, every: int = 1) -> StepTable:
        """The steps of ``window`` that are multiples of ``every``, as a subscription to StepCompleted has them."""
        skipped = -window.first_step % every
        steps = range(window.first_step + skipped, window.last_step + 1, every)
        first_batch = window.first_batch + skipped
        batches = range(first_batch, first_batch + every * len(steps), every)
        metrics: Mapping[str, np.ndarray[Any, Any]] = window.metrics
        if every > 1:
            metrics = {name: column[skipped::every] for name, column in metrics.items()}
        return cls(steps, window.epoch, batches, metrics, window)

    @property
    def size_bytes(self) -> int:
        """About how much memory it takes."""
        return 500 + sum(200 + column.nbytes for column in self.window.metrics.values())


def number_texts(values: Iterable[Any]) -> list[bytes]:
    """Each number as JSON: the shortest digits that are read back as the same number, NaN and infinities as text."""
    text = to_json(list(values), inf_nan_mode="strings")
    return text[1:-1].split(b",") if len(text) > 2 else []


def json_lines(table: StepTable) -> bytes:
    """What ``StepCompleted.model_dump_json()`` gives for each step, joined by line ends, without building the events.

    ``run_id`` and ``time`` are those of the window, ``seq`` is 0. 0.5 us a row of three metrics.
    """
    window = table.window
    constant: dict[str, Any] = {
        "kind": StepCompleted.model_fields["kind"].default,
        "run_id": window.run_id,
        "seq": 0,
        "time": window.time,
        "schema_version": StepCompleted.model_fields["schema_version"].default,
        "epoch": table.epoch,
    }
    literal, pieces = b"{", list[Iterable[bytes]]()
    for field in StepCompleted.model_fields:
        literal += b'"%b":' % field.encode()
        if field in constant:
            literal += to_json(constant[field]) + b","
        elif field == "metrics":
            literal += b"{"
            for name, column in table.metrics.items():
                pieces += [repeat(literal + _json_name(name) + b":"), number_texts(column.tolist())]
                literal = b","
            literal = (b"" if table.metrics else literal) + b"},"
        else:
            pieces += [repeat(literal), number_texts(table.steps if field == "step" else table.batches)]
            literal = b","
    pieces.append(repeat(literal[:-1] + b"}\n"))
    return b"".join(chain.from_iterable(zip(*pieces, strict=False)))[:-1]


def _json_name(name: str) -> bytes:
    """As events write it: half a surrogate pair, which no encoding takes, as replacement characters."""
    return to_json(name.encode("utf-8", "surrogatepass").decode("utf-8", "replace"))
