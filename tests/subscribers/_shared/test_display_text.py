"""Commands as text for people."""

from __future__ import annotations

from eventtrain.events.commands import Cause, ScaleHyperparam
from eventtrain.subscribers._shared.display_text import command_text, issuer


def test_a_command_shows_its_arguments_and_who_issued_it() -> None:
    command = ScaleHyperparam(name="rate", factor=0.5, reason="by hand", source="dashboard", due=3)
    assert command_text(command) == "scale_hyperparam(name=rate, factor=0.5)"
    assert issuer(command) == "dashboard"
    cause = Cause(event="epoch_completed", step=1, subscriber="Policy")
    assert issuer(command.model_copy(update={"cause": cause})) == "Policy"
    assert issuer(ScaleHyperparam(name="rate", factor=0.5)) == ""
