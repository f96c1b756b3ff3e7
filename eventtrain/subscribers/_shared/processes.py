"""Finds out which processes of a run are on this machine."""

from __future__ import annotations

import socket
from time import monotonic

from eventtrain.control.run_context import RunContext


def place_on_machine(run: RunContext, key: str, timeout_s: float = 30.0) -> int:
    """Returns how many processes of the run with lower numbers are on this machine: 0 for the first one. Blocks.

    Each process of the run must call it. One that does not within ``timeout_s`` counts as being on this machine.

    Args:
        run: that has started.
        key: names the caller, the same on each process.
        timeout_s: for all of them together.

    Raises:
        PeerLost: another process has failed or is gone.
    """
    exchange, here, end_s = run.exchange, socket.gethostname(), monotonic() + timeout_s
    if exchange is None:
        return 0
    exchange.set(f"place/{key}/{run.process_index}", here)
    place = 0
    for index in range(run.process_index):
        there = None
        while there is None and monotonic() < end_s:
            there = exchange.wait_for(f"place/{key}/{index}", 0.5)
        place += there in (here, None)
    return place
