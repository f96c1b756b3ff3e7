"""``ControlPlane``: the control side of one trainer."""

from __future__ import annotations

from eventtrain.bus.core import BusCore
from eventtrain.bus.subscription import SubscriptionCore
from eventtrain.control.checkpoint_handover import CheckpointHandover
from eventtrain.control.command_queue import CommandQueue
from eventtrain.control.control import Control, Transaction
from eventtrain.control.held_states import HeldStates
from eventtrain.control.requests import RunRequests
from eventtrain.control.run_view import RunView
from eventtrain.events import Event


class ControlPlane:
    """State shared by a trainer's handlers, subscribers and training thread, over all of its runs.

    Attributes:
        view: what ``Control`` shows.
        queue: commands on their way to the training thread.
        requests: of the subscribers of the run in progress.
        handover: snapshots on their way to Checkpointers.
        control: commands without a cause: they take effect as soon as they arrive.
        held_states: of the functions that take the state. Changed between runs only.
    """

    def __init__(self, bus: BusCore) -> None:
        self.view = RunView()
        self.queue = CommandQueue(bus, self.view)
        self.requests = RunRequests()
        self.handover = CheckpointHandover(bus, self.queue, self.requests)
        self.control = Control(self.queue, self.view)
        self.held_states: list[HeldStates] = []

    def control_of_run(self) -> Control:
        """Returns the control for the subscribers of the run that begins: later runs refuse its commands."""
        return Control(self.queue, self.view, run=self.queue.run)

    def begin_transaction(self, subscription: SubscriptionCore, event: Event) -> Transaction:
        """Returns the control of one handler call."""
        return Transaction(self.queue, self.view, event, subscription)
