"""Names of checkpoint folders. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from string import Formatter

from eventtrain.errors import ConfigurationError

DEFAULT_TEMPLATE = "step-{step:08d}"
LONGEST = 200


def check_template(template: str) -> frozenset[str]:
    """Returns the names of the metrics in ``template``.

    Raises:
        ConfigurationError: it is not valid, has neither step nor epoch, or cannot give a folder's name.
    """
    names = {name for _, name, _ in _parsed(template) if name is not None}
    if not {"step", "epoch"} & names:
        raise ConfigurationError(
            f"Checkpointer(template={template!r}): template must contain {{step}} or {{epoch}}; otherwise all "
            f"checkpoints would have one name. The default is {DEFAULT_TEMPLATE!r}."
        )
    metrics = frozenset(names - {"step", "epoch"})
    name = fill_template(template, 1, 2, dict.fromkeys(metrics, 0.5))
    if step_in(name) not in (None, 1):
        raise ConfigurationError(
            f"Checkpointer(template={template!r}): names such as {name!r} are of the step that they contain. Begin the "
            "template with another word."
        )
    return metrics


def fill_template(template: str, step: int, epoch: int, metrics: Mapping[str, float]) -> str:
    """Returns the folder's name. The template is filled in, never evaluated: a field is a name with a format.

    Raises:
        KeyError: a metric is missing. ConfigurationError: the result cannot be a folder's name.
    """
    values = {**metrics, "step": step, "epoch": epoch}
    name = ""
    for literal, field, spec in _parsed(template):
        name += literal
        if field is not None:
            try:
                name += format(values[field], spec)
            except ValueError as error:
                raise ConfigurationError(
                    f"Checkpointer(template={template!r}): {{{field}:{spec}}} cannot format {values[field]!r} "
                    f"({error})."
                ) from error
    return checked_name(name, f"Checkpointer(template={template!r})")


def checked_name(name: str, subject: str) -> str:
    """Returns ``name`` if it can be a folder's name on every system; raises ConfigurationError if not."""
    if not re.fullmatch(rf"[A-Za-z0-9_][A-Za-z0-9_.=+,%-]{{0,{LONGEST - 1}}}", name):
        raise ConfigurationError(
            f"{subject}: {name!r} cannot be a folder's name. Use at most {LONGEST} letters, digits and _ . - = + , %, "
            "beginning with a letter or digit."
        )
    return name


def step_in(name: str) -> int | None:
    """Returns the step in a folder's name that begins as the default template's; None for other names."""
    match = re.match(r"step-(\d{8,18})(?!\d)", name, re.ASCII)
    return int(match[1]) if match else None


def scheduled_tag(step: int) -> str:
    """Returns the tag of a snapshot that was requested without one."""
    return f"step-{step}"


def _parsed(template: str) -> list[tuple[str, str | None, str]]:
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise ConfigurationError(f"Checkpointer(template={template!r}): {error}.") from error
    for _, field, spec, conversion in parts:
        if field == "" or conversion or "{" in (spec or ""):
            raise ConfigurationError(
                f"Checkpointer(template={template!r}): a field must be a name with a format after a colon, such as "
                "{step:08d}, without conversions or fields within formats."
            )
    return [(literal, field, spec or "") for literal, field, spec, _ in parts]
