"""Reductions over the rows of an epoch, which leave out NaN, and values derived from them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from eventtrain.control.run_state import SavedMeans
from eventtrain.device.reductions import Mean, Reduction, reductions_of
from eventtrain.errors import MetricsError
from eventtrain.loop.event_builder import RunningMeans, with_derived

NAN = math.nan
COLUMNS = {
    "plain": np.array([1.0, NAN, 3.0, 4.0]),
    "aux": np.array([NAN, 2.0, NAN, 5.0]),
    "tokens": np.array([3, 1, 2, 4]),
    "peak": np.array([-5.0, NAN, -2.0, NAN]),
    "last": np.array([1.0, 2.0, 7.0, NAN]),
    "never": np.full(4, NAN),
}
REDUCTIONS = (
    ("aux", Reduction("mean", "tokens")),
    ("last", Reduction("last")),
    ("never", Reduction("max")),
    ("peak", Reduction("max")),
    ("tokens", Reduction("sum")),
)
EXPECTED = {"plain": NAN, "aux": (2 * 1 + 5 * 4) / 5, "tokens": 10, "peak": -2, "last": 7, "never": NAN}


@pytest.mark.parametrize("cut", [0, 1, 3])
def test_own_reductions_leave_out_nan_and_continue_from_a_checkpoint(cut: int) -> None:
    first, means = RunningMeans(None), RunningMeans(None)
    first.add({name: column[:cut] for name, column in COLUMNS.items()}, cut, REDUCTIONS)
    means.resume(SavedMeans.model_validate_json(first.saved.model_dump_json()))
    if cut == 3:
        assert means.means()["last"] == 7
    means.add({name: column[cut:] for name, column in COLUMNS.items()}, 4 - cut, REDUCTIONS)
    assert means.means() == pytest.approx(EXPECTED, nan_ok=True)


def test_a_mean_of_its_own_takes_the_weight_of_the_trainer() -> None:
    means = RunningMeans("tokens")
    means.add({"aux": COLUMNS["aux"], "tokens": COLUMNS["tokens"]}, 4, [("aux", Reduction("mean"))])
    assert means.means() == {"aux": (2 * 1 + 5 * 4) / 5, "tokens": 10}


def test_an_unknown_weight_is_named() -> None:
    with pytest.raises(MetricsError, match=r"'aux' is et\.Mean\(weight='examples'\).*aux, n"):
        reductions_of({"aux": Mean(1.0, weight="examples"), "n": 1})
    with pytest.raises(MetricsError, match=r"'aux': et\.Mean\(weight='examples'\).*aux, n"):
        RunningMeans(None).add(
            {"aux": np.ones(1), "n": np.ones(1)}, 1, [("aux", Reduction("mean", "examples"))]
        )


def test_derived_values_see_those_before_them_and_are_left_out_without_their_metric() -> None:
    derive: Any = {
        "perplexity": lambda means: math.exp(means["loss"]),
        "twice": lambda means: np.float32(2) * means["perplexity"],
        "missing": lambda means: means["nothing"],
        "undefined": lambda means: math.log(-means["loss"]),
    }
    found = with_derived({"loss": 0.0}, derive)
    assert found == pytest.approx(
        {"loss": 0.0, "perplexity": 1.0, "twice": 2.0, "undefined": NAN}, nan_ok=True
    )
    assert with_derived({"loss": 1e6}, derive)["perplexity"] == math.inf
    for wrong in (lambda means: "text", lambda means: means.loss):
        with pytest.raises(MetricsError, match=r"derive=\{'x'"):
            with_derived({"loss": 0.0}, {"x": wrong})
