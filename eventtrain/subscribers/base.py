"""``Subscriber``: a class that handles events of a run, with a life of its own and state worth saving."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any

from eventtrain.bus.barrier import SubscriptionCheckpoint
from eventtrain.bus.core import BusCore
from eventtrain.bus.handlers import require_annotation, takes_control
from eventtrain.bus.options import OPTION_NAMES, EventTypes, OptionDefaults
from eventtrain.bus.subscription import SubscriptionCore
from eventtrain.control.control import Control
from eventtrain.control.run_context import RunContext
from eventtrain.control.run_state import SavedRun
from eventtrain.errors import ConfigurationError, did_you_mean
from eventtrain.events import BUILT_IN, Event
from eventtrain.events.models import snake_case
from eventtrain.validation.annotations import fits, shown
from eventtrain.validation.callables import is_async, require_plain


class Subscriber(OptionDefaults):
    """Base class of all subscriber classes.

    Either set ``events`` and write ``async def handle(self, event, control)``, or write methods named after events:
    ``async def on_epoch_completed(self, event)`` or ``(self, event, control)``. All events of one subscriber arrive
    in one order, one at a time. ``SubscriptionOptions`` are attributes. ``event_types`` lists event classes of your own
    that ``on_...`` methods are named after.

    With ``async def handle_series(self, series)`` beside, the StepCompleted events of a window come as one
    ``StepSeries``, in their place among the other events, which costs a tenth. Not with ``where``, ``once``,
    ``every_s``, ``timeout_s``, retries, ``concurrency``, a finite lag or a queue that drops.
    """

    events: EventTypes | None = None
    event_types: Collection[type[Event]] = ()
    resumes_runs: bool = False
    """Whether ``saved_run`` can find checkpoints."""
    state_about: Mapping[str, str] = {}
    """Subject of the state, such as the monitored metric. A run that resumes leaves out a state about something else,
    with a warning, and the subscriber starts from scratch."""
    process_0_decides: bool = False
    """With ``per_host``: it makes its decisions in process 0 alone, so that it may have a finite lag."""
    output_paths: tuple[Path, ...] = ()
    """Files and folders that it writes and no other subscriber may, relative to ``run_dir`` or absolute. With
    ``per_host``, neither may the same one in another process."""
    shared_directories: tuple[Path, ...] = ()
    """With ``per_host``: folders that the processes of a run must share, relative to ``run_dir`` or absolute."""

    async def start(self, run: RunContext) -> None:
        """Called before anything is published. On the bus' event loop.

        An exception fails the run, with a note that names the subscriber: those after it are not started, and
        ``finish`` and ``stop`` are called of those before it and of itself.
        """

    async def finish(self) -> None:
        """Called when the run has ended: completes what is under way, and publishes the outcome.

        Before the ``stop`` of any subscriber, on the bus' event loop. Cancelled at the end of the run's drain timeout.
        """

    async def stop(self) -> None:
        """Called when the run has ended and everything was handled. On the bus' event loop; cancelled as ``finish``."""

    @property
    def unwritten(self) -> int:
        """Number of rows or messages that were handled and are not written or sent; read after ``stop``. Any thread.

        ``FitResult.undelivered`` counts them.
        """
        return 0

    async def flush(self) -> None:
        """Makes durable what was handled so far. Called before ``state_dict``, for a checkpoint.

        If it raises, SubscriberFailed and the log report it, and the checkpoint is written all the same.
        """

    def state_dict(self) -> dict[str, Any]:
        """Returns the state that must survive a restart, as plain JSON data, with text as keys.

        If it raises, or returns something else, SubscriberFailed and the log report it, and the checkpoint is written
        without it: a run that resumes from it has the subscriber start with the events after the checkpoint.
        """
        return {}

    def rescue(self) -> None:
        """Saves what would be lost: the event loop is blocked or gone, so that nothing else of this class can run.

        Called at the end of such a run instead of ``finish`` and ``stop``, on the training thread. Blocks.
        """

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what ``state_dict`` returned."""

    def saved_run(self, run_dir: Path, which: bool | str | int | Path) -> SavedRun | None:
        """Returns the checkpoint to resume from; None if ``which`` is True and there is none yet. Blocks; any thread.

        Args:
            run_dir: the folder of the run.
            which: True for the newest; else a path, a tag or a step.

        Raises:
            SnapshotError: there is no such checkpoint.
        """


def name_of(subscriber: Subscriber) -> str:
    """Returns the name of its subscription: ``name``, or else that of its class."""
    return subscriber.name or type(subscriber).__name__


def subscribe(bus: BusCore, subscriber: Subscriber) -> SubscriptionCore:
    """Subscribes one ``Subscriber`` to ``bus``, detached. Sets its ``name`` if another subscription has that name.

    Raises:
        ConfigurationError: it handles nothing, an option or a method cannot work, or a name is misspelt.
    """
    if not isinstance(subscriber, Subscriber):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigurationError(
            f"Expected a Subscriber, got {type(subscriber).__name__}. Subclass eventtrain.Subscriber, or use "
            "trainer.on(...) for a function."
        )
    if not fits(subscriber.name, str | None):
        raise ConfigurationError(
            f"{type(subscriber).__name__}.name must be a string or None, got {shown(subscriber.name)}."
        )
    name = name_of(subscriber)
    _require_no_misspelt_attribute(type(subscriber), name)
    _require_own_methods(subscriber, name)
    event_types, handler = event_routes(subscriber, name)
    has_state = type(subscriber).state_dict is not Subscriber.state_dict
    if has_state and subscriber.concurrency > 1:
        raise ConfigurationError(
            f"{name} has state_dict() and concurrency={subscriber.concurrency}: its state would depend on which "
            "handler was faster. Use concurrency=1."
        )

    async def save() -> SubscriptionCheckpoint:
        problem = None
        try:
            await subscriber.flush()
        except Exception as error:  # the state says how far the output goes
            problem = f"{type(error).__name__}: {error}"
        state, about = subscriber.state_dict(), dict(subscriber.state_about)
        return SubscriptionCheckpoint(state, error=problem, about=about)

    options = {**{option: getattr(subscriber, option) for option in OPTION_NAMES}, "name": name}
    if subscriber.process_0_decides:
        options["per_host"] = False  # the run looks at the attribute
    core = bus.subscribe(
        event_types,
        handler,
        options,
        take_series=_series_handler(subscriber, name),
        save=save if has_state else None,
        attach=False,
    )
    if core.name != name:
        subscriber.name = core.name
    return core


def _series_handler(subscriber: Subscriber, name: str) -> Callable[..., Any] | None:
    """Returns its ``handle_series``, unless a subclass has changed what handling an event means."""
    for cls in type(subscriber).__mro__:
        if "handle_series" in vars(cls):
            series_handler: Any = getattr(subscriber, "handle_series")  # noqa: B009  not every Subscriber has it
            if not is_async(series_handler):
                raise ConfigurationError(
                    f"{name}.handle_series must be written `async def handle_series(self, series)`: it runs on the "
                    "event loop."
                )
            return series_handler
        if "handle" in vars(cls) or "on_step_completed" in vars(cls):
            return None
    return None


def event_routes(subscriber: Subscriber, name: str) -> tuple[EventTypes, Callable[..., Any]]:
    """Returns the events that ``subscriber``, called ``name`` in messages, handles, and one handler for all of them.

    Raises:
        ConfigurationError: it handles nothing; or a method is not named after an event, is not a coroutine function, or
            takes other arguments.
    """
    handle = getattr(subscriber, "handle", None)
    if handle is not None:
        if subscriber.events is None:
            raise ConfigurationError(
                f"{name} has handle() but no events. Set events = et.EpochCompleted, or a union."
            )
        return subscriber.events, handle
    if not fits(subscriber.event_types, Collection[type[Event]]):
        raise ConfigurationError(
            f"{name}.event_types must be a tuple of event classes, got {shown(subscriber.event_types)}."
        )
    named = {
        snake_case(event_type.__name__): event_type
        for event_type in (*BUILT_IN, Event, *subscriber.event_types)
    }
    methods: dict[type[Event], tuple[Callable[..., Any], bool]] = {}
    for attribute in dir(subscriber):  # and not inspect.getmembers, which would evaluate every property
        if not attribute.startswith("on_") or not callable(method := getattr(subscriber, attribute)):
            continue
        event_type = named.get(attribute.removeprefix("on_"))
        if event_type is None:
            hint = did_you_mean(
                attribute,
                (f"on_{event}" for event in named),
                "List event classes of your own in event_types.",
            )
            raise ConfigurationError(f"{name}.{attribute} is not named after an event. {hint}")
        with_control = takes_control(method)
        if not is_async(method):
            raise ConfigurationError(
                f"{name}.{attribute} must be written `async def`: it runs on the event loop."
            )
        require_annotation(method, (event_type,), f"{name}.{attribute}")
        methods[event_type] = (method, with_control)
    if not methods:
        raise ConfigurationError(
            f"{name} handles no event. Set events and write handle(event, control), or write on_epoch_completed(event)."
        )

    def method_for(event: Event) -> tuple[Callable[..., Any], bool]:
        return next(methods[base] for base in type(event).__mro__ if base in methods)

    async def observe(event: Event) -> object:
        return await method_for(event)[0](event)

    async def decide(event: Event, control: Control) -> object:
        method, with_control = method_for(event)
        return await (method(event, control) if with_control else method(event))

    return tuple(methods), decide if any(control for _, control in methods.values()) else observe


def _require_own_methods(subscriber: Subscriber, name: str) -> None:
    """Raises ConfigurationError if an overridden method of ``Subscriber`` is async and should not be, or reversed."""
    for method in ("start", "finish", "stop", "flush"):
        if not is_async(getattr(subscriber, method)):
            raise ConfigurationError(
                f"{name}.{method} must be written `async def`: it is awaited on the event loop."
            )
    for method in ("state_dict", "load_state_dict", "saved_run", "rescue"):
        require_plain(f"{name}.{method}", getattr(subscriber, method))


def _require_no_misspelt_attribute(cls: type[Subscriber], name: str) -> None:
    """Raises ConfigurationError for a class attribute whose name is one typing error away from one of ``Subscriber``.

    Other attributes of the user's own stay possible, and similar ones too: if they are of another kind (``step = 0`` is
    not a misspelt ``stop()``), beside an override of the similar name, or with a leading underscore.
    """
    bases = [base for base in cls.__mro__ if base not in Subscriber.__mro__]
    own = {attribute: value for base in bases for attribute, value in vars(base).items()}
    for attribute, value in own.items():
        if attribute.startswith("_") or hasattr(Subscriber, attribute) or isinstance(value, property):
            continue
        for known in dir(Subscriber):
            if known.startswith("_") or known in own or not _is_misspelling(attribute, known):
                continue
            is_function = known == "where" or callable(getattr(Subscriber, known))
            if is_function == (callable(value) and not isinstance(value, type)):
                raise ConfigurationError(
                    f"{name}.{attribute} is not an attribute of Subscriber. {did_you_mean(attribute, [known])} An "
                    "attribute of your own needs a less similar name, or a leading underscore."
                )


def _is_misspelling(given: str, known: str) -> bool:
    """Returns whether one typing error turns ``known`` into ``given``: two letters swapped, or one wrong, missing or
    added.

    Short names have too many neighbours that are words (``stop`` and ``step``, ``lag`` and ``tag``), plurals are words
    of their own: both count only if letters are swapped.
    """
    start = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(given, known, strict=False)))
    rest, known_rest = given[start:], known[start:]
    if rest[:2] == known_rest[1::-1] and rest[2:] == known_rest[2:]:
        return True
    if len(known) <= 4 or f"{given}s" == known or f"{known}s" == given:
        return False
    return rest[1:] == known_rest[1:] or rest[1:] == known_rest or rest == known_rest[1:]
