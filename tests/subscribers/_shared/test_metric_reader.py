"""One metric read from events, and reported when it is missing."""

from __future__ import annotations

import logging

import pytest

import eventtrain as et
from eventtrain.subscribers._shared.metric_reader import MetricReader


def test_a_missing_metric_is_said_once_with_the_nearest_names_first(caplog: pytest.LogCaptureFixture) -> None:
    reader = MetricReader("Policy", "val_los")
    with caplog.at_level(logging.WARNING, "eventtrain"):
        for _ in range(3):
            assert reader.read({"accuracy": 1.0, "val_loss": 2.0}) is None
    (record,) = caplog.records
    assert "Policy monitors 'val_los'" in record.message
    assert "(val_loss, accuracy)" in record.message
    assert "eval_data" not in record.message  # there was an evaluation


def test_a_missing_metric_of_evaluations_asks_for_their_data_if_there_are_none(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, "eventtrain"):
        assert MetricReader("Policy", "val_loss").read({"loss": 1.0}) is None
    (record,) = caplog.records
    assert "eval_data" in record.message
    assert "EvaluateEvery" in record.message


def test_a_missing_metric_is_an_error_where_strict() -> None:
    with pytest.raises(et.ConfigurationError, match=r"monitors 'los'.*\(loss, acc\)"):
        MetricReader("Policy", "los", strict=True).read({"acc": 1.0, "loss": 2.0})


def test_an_epoch_without_an_evaluation_says_nothing_of_a_metric_of_evaluations() -> None:
    reader = MetricReader("Policy", "val_loss", strict=True, evaluates=True)
    assert [reader.read(m) for m in ({"loss": 1.0}, {"val_loss": 2.0}, {"loss": 1.0})] == [None, 2.0, None]
    with pytest.raises(et.ConfigurationError, match=r"'val_loss', which is not among .*\(val_los, loss\)"):
        reader.read({"val_los": 1.0, "loss": 2.0})
    with pytest.raises(et.ConfigurationError, match=r"'los', which is not among"):
        MetricReader("Policy", "los", strict=True, evaluates=True).read({"loss": 1.0})


def test_the_prefix_of_an_epochs_evaluation_is_left_off_for_an_evaluations_own_metrics_only() -> None:
    reader = MetricReader("Policy", "val_loss")
    assert reader.read({"loss": 2.0}, unprefixed=True) == 2.0
    assert reader.read({"loss": 2.0}) is None
