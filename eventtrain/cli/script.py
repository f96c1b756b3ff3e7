"""The script of ``eventtrain run``: a Python file that says what is trained, on what, and by which step."""

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

import eventtrain as et

EXAMPLE = """For example:

    def make_trainer(subscribers):
        return et.Trainer(step_fn, state, subscribers=subscribers)

    data = et.ArrayLoader((inputs, targets), batch_size=32)  # or make_data(); also eval_data"""


@dataclass(frozen=True)
class Job:
    """What a script wants to have trained: the arguments of ``trainer.fit`` but for its length."""

    trainer: et.Trainer[Any]
    data: Any
    eval_data: Any = None


@contextmanager
def imported(path: Path) -> Generator[ModuleType]:
    """The file as a module of its own name, not ``__main__``; its folder is first on ``sys.path`` in the block.

    Raises:
        ConfigurationError: there is no such file, or a loaded module has its name. What the file raises goes through.
    """
    name = path.stem
    if path.suffix != ".py" or not path.is_file():
        raise et.ConfigurationError(f"{path} is no Python file.")
    if name in sys.modules:
        raise et.ConfigurationError(
            f"{path}: a module named {name!r} is loaded already, and the script would hide it. Rename the script."
        )
    spec = importlib.util.spec_from_file_location(name, path.absolute())
    assert spec is not None and spec.loader is not None  # noqa: PT018
    module = importlib.util.module_from_spec(spec)
    folder = str(path.absolute().parent)
    sys.modules[name] = module  # where dataclasses look, and from where worker processes import its functions
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(folder)
        del sys.modules[name]


def prepare(module: ModuleType, subscribers: Sequence[et.Subscriber]) -> Job:
    """Have the script make its trainer and its data.

    ``make_trainer`` returns a Trainer, ``(trainer, data)`` or ``(trainer, data, eval_data)``. With a parameter
    ``subscribers`` it gets them and hands them to the Trainer; without one they are subscribed afterwards.

    Raises:
        ConfigurationError: something is missing or of another kind. What the script raises goes through.
    """
    make_trainer = getattr(module, "make_trainer", None)
    if not callable(make_trainer):
        raise et.ConfigurationError(f"{module.__file__} does not define make_trainer(). {EXAMPLE}")
    takes_subscribers = _takes_subscribers(make_trainer, module)
    made = make_trainer(subscribers=list(subscribers)) if takes_subscribers else make_trainer()
    parts = made if isinstance(made, tuple) else (made,)
    if not 1 <= len(parts) <= 3 or not isinstance(parts[0], et.Trainer):
        raise et.ConfigurationError(
            f"make_trainer() of {module.__file__} returned {_kind(made)}: needs a Trainer, (trainer, data) "
            "or (trainer, data, eval_data)."
        )
    job = Job(
        parts[0],
        parts[1] if len(parts) > 1 else _defined(module, "data"),
        parts[2] if len(parts) > 2 else _defined(module, "eval_data"),
    )
    if job.data is None:
        raise et.ConfigurationError(f"{module.__file__} defines neither `data` nor make_data(). {EXAMPLE}")
    if takes_subscribers:
        _check_taken(job.trainer, subscribers, module)
    else:
        for subscriber in subscribers:
            job.trainer.subscribe(subscriber)
    return job


def passed_through(error: BaseException, path: Path) -> bool:
    """Whether the script's own lines were at work when ``error`` was raised."""
    file = str(path.absolute())
    return any(frame.f_code.co_filename == file for frame, _ in walk_tb(error.__traceback__))


def _takes_subscribers(make_trainer: Callable[..., Any], module: ModuleType) -> bool:
    parameters = inspect.signature(make_trainer).parameters
    needed = [
        name
        for name, parameter in parameters.items()
        if name != "subscribers"
        and parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if needed:
        raise et.ConfigurationError(
            f"make_trainer() of {module.__file__} needs {', '.join(needed)}, which nobody gives. It may have a "
            "parameter `subscribers`; give the others defaults."
        )
    return "subscribers" in parameters


def _check_taken(trainer: et.Trainer[Any], subscribers: Sequence[et.Subscriber], module: ModuleType) -> None:
    left = [
        type(one).__name__ for one in subscribers if not any(one is taken for taken in trainer.subscribers)
    ]
    if left:
        raise et.ConfigurationError(
            f"make_trainer(subscribers) of {module.__file__} did not hand on {', '.join(left)}. Pass all of them: "
            "Trainer(..., subscribers=[*subscribers, ...]); or drop the parameter, and they are added afterwards."
        )


def _defined(module: ModuleType, name: str) -> Any:
    make = getattr(module, f"make_{name}", None)
    found = getattr(module, name, None)
    return make() if found is None and make is not None else found


def _kind(made: Any) -> str:
    if isinstance(made, tuple):
        return f"({', '.join(type(part).__name__ for part in made)})"
    return type(made).__name__
