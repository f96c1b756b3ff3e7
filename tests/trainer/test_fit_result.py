from __future__ import annotations

import sys
import xml.dom.minidom
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import eventtrain as et
from tests.support.models import batches, make_trainer


def test_a_result_is_shown_in_one_line_whatever_it_holds(tmp_path: Path) -> None:
    def step(state: Any, batch: Any) -> Any:
        return state, {"loss": batch}

    trainer = et.Trainer(step, {"w": jnp.zeros((100, 100))}, run_dir=tmp_path)
    result = trainer.fit([np.float32(1)] * 2, epochs=30, progress=False)
    assert repr(result) == "FitResult(step=60, epochs_completed=30, stop_reason='completed', undelivered={})"
    assert len(result.history) == 30
    assert result.state["w"].shape == (100, 100)


def test_the_history_keeps_the_newest_epochs_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eventtrain.loop.event_builder.HISTORY_LIMIT", 3)
    result = make_trainer(tmp_path).fit(batches(1), epochs=5)
    assert [epoch.epoch for epoch in result.history] == [2, 3, 4]
    assert result.epochs_completed == 5


HOSTILE = "<img src=x onerror=alert(1)>"


def trained(tmp_path: Path, epochs: int = 3) -> et.FitResult[Any]:
    def step(state: Any, batch: Any) -> Any:
        return state, {"loss": batch, HOSTILE: batch * 2, **{f"m{index}": batch for index in range(30)}}

    trainer = et.Trainer(
        step, {"w": jnp.zeros(2)}, eval_fn=lambda state, batch: {"loss": batch * 3}, run_dir=tmp_path
    )
    return trainer.fit([np.float32(2)] * 2, epochs=epochs, eval_data=[np.float32(2)], progress=False)


def test_a_notebook_shows_a_result_as_charts_and_a_table_of_text(tmp_path: Path) -> None:
    shown = trained(tmp_path)._repr_html_()
    xml.dom.minidom.parseString(shown)
    assert "completed" in shown
    assert "step 6, 3 epochs" in shown
    assert shown.count("<svg") == 12
    assert ">val_loss</td>" in shown
    assert "6  epoch 1</td>" in shown
    assert "<img" not in shown
    assert "&lt;img" in shown


def test_what_a_notebook_shows_of_a_long_run_is_bounded() -> None:
    values = np.random.default_rng(0).normal(size=10_000)
    history = [
        et.EpochCompleted(
            step=10 * epoch, epoch=epoch, steps=10, duration_s=1.0,
            metrics={f"{HOSTILE * 100}{index}": float(value) for index in range(40)},
        )
        for epoch, value in enumerate(values)
    ]  # fmt: skip
    undelivered = {f"subscriber {index}": 1 for index in range(1000)}
    result = et.FitResult({}, 100_000, 10_000, "completed", history, undelivered)
    assert len(result._repr_html_()) < 150_000


def test_a_result_is_a_figure_and_a_dataframe(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("pandas")
    result = trained(tmp_path)
    figure = result.plot(("loss",), theme="dark")
    assert [len(axes.lines[0].get_xdata()) for axes in figure.axes] == [3]
    assert len({line.get_color() for line in figure.axes[0].lines if len(line.get_xdata())}) == 2  # val_loss
    assert figure._repr_png_().startswith(b"\x89PNG")  # type: ignore[attr-defined]
    assert len(result.plot().axes) == 24
    frame = result.to_dataframe()
    assert list(frame["loss"]) == [2.0, 2.0, 2.0]
    assert list(frame["val_loss"]) == [6.0, 6.0, 6.0]


def test_a_result_draws_the_hyperparameters_that_changed(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    history = [
        et.EpochCompleted(
            step=epoch + 1, epoch=epoch, steps=1, duration_s=1.0, metrics={"loss": 1.0},
            hyperparams={"b1": 0.9, "learning_rate": 0.1 / (epoch + 1)},
        )
        for epoch in range(3)
    ]  # fmt: skip
    figure = et.FitResult({}, 3, 3, "completed", history, {}).plot()
    assert [text.get_text() for text in figure.texts][-2:] == ["loss", "learning_rate"]
    assert len(figure.axes) == 2


@pytest.mark.parametrize(
    "wrong", [{"scale": "cubic"}, {"theme": "blue"}, {"metrics": "loss"}, {"metrics": [1]}]
)
def test_a_wrong_argument_of_plot_is_refused_by_name(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(et.errors.ConfigurationError, match=next(iter(wrong))):
        trained(tmp_path, epochs=1).plot(**wrong)


@pytest.mark.parametrize(
    ("method", "package", "extra"), [("plot", "matplotlib", "plots"), ("to_dataframe", "pandas", "dataframe")]
)
def test_a_missing_package_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, package: str, extra: str
) -> None:
    result = trained(tmp_path, epochs=1)
    for name in [
        name for name in sys.modules if name.split(".")[0] == package or name.endswith("reports.plotting")
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(et.errors.ConfigurationError, match=rf"eventtrain\[{extra}\]"):
        getattr(result, method)()
