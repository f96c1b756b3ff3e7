"""``Summary``: a table of the arrays of the state, and the memory of the compiled step, once at the beginning."""

from __future__ import annotations

from functools import partial

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from eventtrain.control.run_context import StateArray
from eventtrain.errors import printable
from eventtrain.events import RunCompleted, StepsCompleted
from eventtrain.subscribers._shared.display_text import size_text
from eventtrain.subscribers._shared.worker_thread import in_own_thread
from eventtrain.subscribers.base import RunContext, Subscriber
from eventtrain.validation.annotations import checked
from eventtrain.validation.arguments import require_count


class Summary(Subscriber):
    """Prints a table of the arrays of the state, and the memory of the compiled step.

    The table has path, shape, dtype, sharding, count and bytes of each array. It is printed once in each run, when the
    metrics of its first step arrive. No array is read, and no step waits.

    Args:
        most_rows: of the table; of more arrays, the largest are shown, in their order in the state.
        params_only: leave out what is not a weight, such as the state of the optimiser.
        console: a ``rich.console.Console``; None: standard error.

    Attributes:
        arrays: of the newest run; empty before its first step.
        memory: of the compiled step on one device, name -> bytes: "arguments", "outputs", "aliased" (outputs in the
            place of donated arguments), "temporary" and "code"; empty where the backend tells none.

    Raises:
        ConfigurationError: an argument is invalid.
    """

    @checked
    def __init__(
        self, *, most_rows: int = 60, params_only: bool = False, console: Console | None = None
    ) -> None:
        require_count("Summary", "most_rows", most_rows, at_least=1)
        self._most_rows = most_rows
        self._params_only = params_only
        self._console = console
        self._run: RunContext | None = None
        self.arrays: tuple[StateArray, ...] = ()
        self.memory: dict[str, int] = {}

    async def start(self, run: RunContext) -> None:
        """Begins a run."""
        self._run = run
        self.arrays, self.memory = (), {}

    async def on_steps_completed(self, event: StepsCompleted) -> None:
        """Prints the table, at the first call in a run."""
        await self._print()

    async def on_run_completed(self, event: RunCompleted) -> None:
        """Prints the table of a run without a step."""
        await self._print()

    async def _print(self) -> None:
        run, self._run = self._run, None
        if run is not None:
            await in_own_thread(partial(self._print_for, run))

    def _print_for(self, run: RunContext) -> None:
        self.arrays = tuple(run.arrays())
        program = run.program()
        self.memory = {} if program is None else dict(program.memory)
        console = self._console or Console(stderr=True)
        console.print(self._table())
        console.print(Text("\n".join(self._totals())))

    def _table(self) -> Table:
        arrays = [one for one in self.arrays if one.is_param or not self._params_only]
        largest = sorted(range(len(arrays)), key=lambda index: arrays[index].size_bytes, reverse=True)
        shown = sorted(largest[: self._most_rows])
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("array", overflow="fold")
        for name in ("shape", "dtype", "sharding"):
            table.add_column(name, overflow="fold")
        for name in ("count", "bytes"):
            table.add_column(name, justify="right", no_wrap=True)
        for one in (arrays[index] for index in shown):
            path = Text(printable(one.path), style="" if one.is_param else "dim")
            shape = " × ".join(map(str, one.shape)) or "scalar"
            table.add_row(path, shape, one.dtype, Text(one.sharding), f"{one.count:,}", f"{one.size_bytes:,}")
        if len(arrays) > len(shown):
            table.add_row(Text(f"{len(arrays) - len(shown):,} smaller ones", style="dim"))
        return table

    def _totals(self) -> list[str]:
        params = [one for one in self.arrays if one.is_param]
        count, size = sum(one.count for one in params), sum(one.size_bytes for one in params)
        lines = [f"weights: {count:,} numbers, {size_text(size)}"] if params else []
        lines.append(
            f"state: {len(self.arrays):,} arrays, {size_text(sum(one.size_bytes for one in self.arrays))}"
        )
        if self.memory:
            memory = ", ".join(f"{name} {size_text(value)}" for name, value in self.memory.items())
            lines.append(f"compiled step, on each device: {memory}")
        return lines
