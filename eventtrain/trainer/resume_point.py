"""Which checkpoint a run resumes from, and what that leaves it to do. Training thread only."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from eventtrain.control.command_queue import CommandQueue
from eventtrain.control.run_state import ResumePoint, SavedRun
from eventtrain.errors import ConfigurationError, SnapshotError
from eventtrain.events.run_records import LoopRecord
from eventtrain.subscribers.base import Subscriber
from eventtrain.trainer.model import Aim, Model, RunOptions
from eventtrain.trainer.resume import take_over

logger = logging.getLogger("eventtrain")


def find_resumption(
    resume: bool | str | int | Path,
    aim: Aim,
    model: Model,
    options: RunOptions,
    inbox: CommandQueue,
    subscribers: Sequence[Subscriber],
) -> tuple[ResumePoint | None, Aim]:
    """What to go on from, after ``model`` and ``subscribers`` have taken it over, and what is left of ``aim``.

    Args:
        resume: True for the checkpoint committed last that holds a run; or a step, a tag or a path.
        aim: of the whole run.
        model, options, inbox, subscribers: of the trainer.

    Raises:
        ConfigurationError: nobody keeps checkpoints. SnapshotError: nobody has the one that ``resume`` names, or it
            holds no run. StateError: something in it does not fit.
    """
    saved = _find_saved_run(resume, options.run_dir, subscribers)
    if saved is None:
        hint = (
            " Give Trainer(run_dir=...): without it each trainer has a new folder."
            if options.run_dir_is_new
            else ""
        )
        logger.warning("Nothing is saved in %s yet, so the run begins anew.%s", options.run_dir, hint)
        return None, aim
    resumption = take_over(saved, model, inbox, subscribers, options.fingerprint)
    facts = resumption.facts.loop
    left = _remaining(facts, aim)
    ended = _why_ended(facts, aim, left, named=resume is not True)
    if ended is not None:
        logger.warning(
            "The run of %s has ended at step %d (%s), so nothing more is trained. Aim higher, or name a checkpoint to "
            "go on from, as in fit(resume=%d).",
            options.run_dir, facts.step, ended, facts.step,
        )  # fmt: skip
    return replace(resumption, ended=ended), left


def _find_saved_run(
    resume: bool | str | int | Path, run_dir: Path, subscribers: Sequence[Subscriber]
) -> SavedRun | None:
    """The checkpoint, of all that ``subscribers`` keep; None where there is none yet."""
    finders = [subscriber for subscriber in subscribers if subscriber.resumes_runs]
    if not finders:
        raise ConfigurationError(
            f"fit(resume={resume!r}) needs somebody who keeps checkpoints: "
            "Trainer(subscribers=[subs.Checkpointer(...)])."
        )
    found: list[SavedRun] = []
    missing: list[SnapshotError] = []
    for subscriber in finders:
        try:
            saved = subscriber.saved_run(run_dir, resume)
        except SnapshotError as error:  # another one may have it
            missing.append(error)
        else:
            found += [saved] if saved is not None else []
    if not found and missing:
        raise missing[0]
    return max(found, key=lambda saved: (saved.facts is not None, saved.time, saved.step), default=None)


def _remaining(facts: LoopRecord, aim: Aim) -> Aim:
    epochs = None if aim.epochs is None else max(0, facts.start_epoch + aim.epochs - facts.epoch)
    steps = None if aim.steps is None else max(0, facts.start_step + aim.steps - facts.step)
    return replace(aim, epochs=epochs, steps=steps)


def _why_ended(facts: LoopRecord, aim: Aim, left: Aim, *, named: bool) -> str | None:
    """Why the run has reached its end already; None where there is something to do.

    Args:
        facts: of the checkpoint.
        aim: of this call.
        left: of that aim.
        named: the checkpoint was chosen by name, to go on from there whatever had ended the run.
    """
    if not facts.in_epoch and 0 in (left.epochs, left.steps):
        return "completed"
    if facts.ended is None or named:
        return None
    higher = (aim.epochs or 0) > (facts.epochs or 0) or (aim.steps or 0) > (facts.steps or 0)
    return None if higher else facts.ended
