from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from eventtrain.data.array_loader import ArrayLoader
from eventtrain.data.sources import epoch_batches
from eventtrain.errors import DataError


def test_an_iterable_is_iterated_anew_each_epoch() -> None:
    data = [1, 2, 3]
    assert [list(epoch_batches(data, epoch)) for epoch in range(2)] == [[1, 2, 3]] * 2


def test_a_callable_gets_the_epoch() -> None:
    assert list(epoch_batches(lambda epoch: range(epoch), 3)) == [0, 1, 2]
    loader = ArrayLoader(np.arange(10), 5)
    assert np.array_equal(list(epoch_batches(loader, 1)), list(loader(1)))


@pytest.mark.parametrize("data", [3, None, "text", b"bytes", {"x": np.ones(3)}])
def test_what_yields_no_batches_is_refused(data: Any) -> None:
    with pytest.raises(DataError, match=f"data is {type(data).__name__}, which yields no batches"):
        epoch_batches(data, 0)


def test_a_callable_that_returns_no_iterable_is_refused() -> None:
    with pytest.raises(DataError, match=r"data\(epoch=2\) returned NoneType"):
        epoch_batches(lambda epoch: None, 2)


def test_errors_of_the_users_callable_pass_unchanged() -> None:
    with pytest.raises(KeyError, match="train"):
        epoch_batches(lambda epoch: {}["train"], 0)
