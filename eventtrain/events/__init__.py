"""Event classes (``catalog.py``) and commands (``commands.py``): frozen Pydantic models."""

from eventtrain.events.base import EpochEvent as EpochEvent
from eventtrain.events.base import Event as Event
from eventtrain.events.base import RunEvent as RunEvent
from eventtrain.events.catalog import *  # noqa: F403
from eventtrain.events.catalog import BUILT_IN as BUILT_IN
from eventtrain.events.catalog import LOOP_EVENTS as LOOP_EVENTS
from eventtrain.events.catalog import TO_BE_CONTINUED as TO_BE_CONTINUED
from eventtrain.events.catalog import TRAINING_SEQUENCE as TRAINING_SEQUENCE
from eventtrain.events.catalog import AnyEvent as AnyEvent
from eventtrain.events.parsing import events_json_schema as events_json_schema
from eventtrain.events.parsing import parse_event as parse_event
