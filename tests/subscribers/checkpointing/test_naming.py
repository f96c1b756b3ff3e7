"""Templates are filled in, never evaluated, and give nothing that leads out of the directory."""

from __future__ import annotations

from pathlib import PurePosixPath, PureWindowsPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

import eventtrain as et
from eventtrain.subscribers.checkpointing.naming import check_template, checked_name, fill_template


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("step-{step:08d}", "step-00000042"),
        ("{epoch:02d}-{step}", "03-42"),
        ("e{epoch}_{val_loss:.3f}", "e3_0.125"),
        ("{step}={val/acc:.1%}", "42=87.5%"),
        ("{step}-{val/acc:+.0e}", "42-+9e-01"),
    ],
)
def test_fields_are_those_of_epoch_step_and_metrics(template: str, name: str) -> None:
    metrics = {"val_loss": 0.125, "val/acc": 0.875}
    assert check_template(template) == {metric for metric in metrics if metric in template}
    assert fill_template(template, 42, 3, metrics) == name


@pytest.mark.parametrize(
    "template",
    [
        "",
        "best",
        "{val_loss}",
        "{}-{step}",
        "{step!r}",
        "{step:{epoch}}",
        "{step",
        "{step}}",
        "../{step}",
        "/{step}",
        "a/{step}",
        "a\\{step}",
        ".{step}",
        "-{step}",
        "{step}\n",
        "{step}\0",
        "{step:s}",
        "{step: >9}",
        "{step:0300d}",
        "~{step}",
        "c:{step}",
        "{step}*",
        "schön-{step}",
    ],
)
def test_templates_that_cannot_be_a_folders_name_are_refused(template: str) -> None:
    with pytest.raises(et.ConfigurationError, match="Checkpointer"):
        check_template(template)


@pytest.mark.parametrize("field", ["step.__class__", "step.real", "step[0]", "val_loss.__init__.__globals__"])
def test_a_field_is_a_name_and_nothing_is_looked_up_in_its_value(field: str) -> None:
    template = "{step}-{" + field + "}"
    assert check_template(template) == {field}
    with pytest.raises(KeyError):
        fill_template(template, 1, 1, {"val_loss": 1.0})


@given(st.text(max_size=30))
def test_what_passes_is_one_plain_folder(text: str) -> None:
    try:
        name = checked_name(text, "It")
    except et.ConfigurationError:
        return
    assert name == text
    for path in (PurePosixPath(name), PureWindowsPath(name)):
        assert path.parts == (name,)
    assert not name.startswith(".")


@given(st.text(max_size=20), st.floats())
def test_a_checked_template_gives_a_name_or_says_why_not(text: str, value: float) -> None:
    template = text + "{step}{loss:.2f}"
    try:
        check_template(template)
        name = fill_template(template, 7, 1, {"loss": value})
    except (et.ConfigurationError, KeyError):
        return
    assert PurePosixPath(name).parts == (name,)
