"""The script of ``eventtrain run``: a Python file that defines the trainer and the data."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from traceback import walk_tb
from types import ModuleType
from typing import Any

from pydantic import ValidationError

import eventtrain as et
from eventtrain.config.load import FitConfig

EXAMPLE = """For example:

    def make_trainer(subscribers):
        return et.Trainer(step_fn, state, subscribers=subscribers)

    data = et.ArrayLoader((inputs, targets), batch_size=32)  # or make_data(); also eval_data
    epochs = 20  # or steps; --epochs and a configuration file come first"""


@dataclass(frozen=True)
class Job:
    """A trainer, and the data that it is to train and evaluate on."""

    trainer: et.Trainer[Any]
    data: Any
    eval_data: Any = None


@contextmanager
def imported(path: Path) -> Generator[ModuleType]:
    """Imports the file as a module of its own name, not ``__main__``, with its folder first on ``sys.path``.

    Both are undone at the end of the block.

    Raises:
        ConfigurationError: the file does not exist, or a loaded module has its name. Errors of the file pass through.
    """
    name = path.stem
    if path.suffix != ".py" or not path.is_file():
        raise et.ConfigurationError(f"{path} is not a Python file.")
    if name in sys.modules:
        raise et.ConfigurationError(
            f"{path}: a module named {name!r} is loaded already, and the script would hide it. Rename the script."
        )
    spec = importlib.util.spec_from_file_location(name, path.absolute())
    assert spec is not None and spec.loader is not None  # noqa: PT018
    module = importlib.util.module_from_spec(spec)
    folder = str(path.absolute().parent)
    sys.modules[name] = module  # dataclasses need it, and worker processes import its functions
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(folder)
        del sys.modules[name]


def prepare(module: ModuleType, subscribers: Sequence[et.Subscriber]) -> Job:
    """Calls the script's functions, and returns its trainer with the subscribers, and its data.

    ``make_trainer`` returns a Trainer, ``(trainer, data)`` or ``(trainer, data, eval_data)``. If it has a parameter
    ``subscribers``, it must pass them to the Trainer; otherwise they are subscribed afterwards.

    Raises:
        ConfigurationError: something is missing or has the wrong type. Errors of the script pass through.
    """
    make_trainer = getattr(module, "make_trainer", None)
    if not callable(make_trainer):
        raise et.ConfigurationError(f"{module.__file__} does not define make_trainer(). {EXAMPLE}")
    takes_subscribers = _takes_subscribers(make_trainer, module)
    made = make_trainer(subscribers=list(subscribers)) if takes_subscribers else make_trainer()
    parts: tuple[Any, ...] = made if isinstance(made, tuple) else (made,)
    if not 1 <= len(parts) <= 3 or not isinstance(parts[0], et.Trainer):
        kinds = ", ".join(type(part).__name__ for part in parts)
        raise et.ConfigurationError(
            f"make_trainer() of {module.__file__} returned {f'({kinds})' if isinstance(made, tuple) else kinds}. "
            "Expected a Trainer, (trainer, data) or (trainer, data, eval_data)."
        )
    defined = (_defined(module, name) for name in ("data", "eval_data")[len(parts) - 1 :])
    job = Job(*parts, *defined)
    if job.data is None:
        raise et.ConfigurationError(f"{module.__file__} defines neither `data` nor make_data(). {EXAMPLE}")
    missing = [one for one in subscribers if not any(one is taken for taken in job.trainer.subscribers)]
    if takes_subscribers and missing:
        names = ", ".join(type(subscriber).__name__ for subscriber in missing)
        raise et.ConfigurationError(
            f"make_trainer(subscribers) of {module.__file__} did not pass on {names}. Pass all of them: "
            "Trainer(..., subscribers=[*subscribers, ...]). Or remove the parameter, and they are added afterwards."
        )
    for subscriber in missing:
        job.trainer.subscribe(subscriber)
    return job


def length_of(module: ModuleType, config: Path | None) -> FitConfig:
    """Returns how long to train: ``epochs`` or ``steps`` of the script.

    Raises:
        ConfigurationError: it defines neither, or what cannot be one.
    """
    given = {
        name: value for name in ("epochs", "steps") if (value := getattr(module, name, None)) is not None
    }
    if not given:
        place = (
            f"Add `epochs = 20` to [fit] of {config}"
            if config
            else f"Define `epochs = 20` in {module.__file__}"
        )
        raise et.ConfigurationError(
            f"{config or module.__file__} does not set the length of the training. {place}, or use --epochs 20."
        )
    try:
        return FitConfig.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise et.ConfigurationError(
            f"{module.__file__}: {' and '.join(given)}: {first['msg']}. Define `epochs` or `steps`, an integer >= 1."
        ) from error


def passed_through(error: BaseException, path: Path) -> bool:
    """Returns whether lines of the script were running when ``error`` was raised."""
    file = str(path.absolute())
    return any(frame.f_code.co_filename == file for frame, _ in walk_tb(error.__traceback__))


def _takes_subscribers(make_trainer: Callable[..., Any], module: ModuleType) -> bool:
    parameters = inspect.signature(make_trainer).parameters
    required = [
        name
        for name, parameter in parameters.items()
        if name != "subscribers"
        and parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if required:
        raise et.ConfigurationError(
            f"make_trainer() of {module.__file__} has required parameters that eventtrain does not pass: "
            f"{', '.join(required)}. Give them defaults; only `subscribers` is passed."
        )
    return "subscribers" in parameters


def _defined(module: ModuleType, name: str) -> Any:
    make = getattr(module, f"make_{name}", None)
    found = getattr(module, name, None)
    return make() if found is None and make is not None else found
