"""How the processes of a run write one checkpoint together: what they tell each other, and what each of them writes.

Process 0 makes a folder and names it to the others. Each process writes its shards there through Orbax, and a file with
their checksums and its own records. When all have, process 0 completes the checkpoint and tells the others. A failure
anywhere ends the attempt everywhere, and process 0 says whether there is another. Every wait ends when a process is
lost, or when this one gives up.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from eventtrain.control.run_context import EXCHANGE_POLL_S, Exchange
from eventtrain.control.run_state import RunRecord
from eventtrain.errors import SnapshotError
from eventtrain.events.models import Frozen
from eventtrain.subscribers.checkpointing.manifest import ARRAYS, SavedArray


class Attempt(Frozen):
    """Process 0 has made the folder ``name`` in the Checkpointer's directory: write your part into it."""

    kind: Literal["attempt"] = "attempt"
    name: str


class CommittedByAll(Frozen):
    """The checkpoint is committed, as ``name``."""

    kind: Literal["committed"] = "committed"
    name: str
    size_bytes: int


class GivenUp(Frozen):
    """There is no further attempt."""

    kind: Literal["given_up"] = "given_up"
    error: str


Message = Annotated[Attempt | CommittedByAll | GivenUp, Field(discriminator="kind")]
_MESSAGE: TypeAdapter[Message] = TypeAdapter(Message)


class HostPart(BaseModel):
    """The part of another process than process 0, as it writes it to a file.

    Attributes:
        arrays: part -> path -> description, with the shards of this process.
        facts: its record; None if only weights are written.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    arrays: dict[str, dict[str, SavedArray]]
    facts: RunRecord | None

    @staticmethod
    def path(folder: Path, index: int) -> Path:
        """Returns the path of the file of one process."""
        return folder / f"process-{index}.json"


def own_folder(folder: Path, index: int) -> Path:
    """Returns the folder of the arrays that a process writes, in the ``folder`` of a checkpoint. Orbax names it."""
    return folder / ARRAYS / f"ocdbt.process_{index}"


def process_of(path: str, count: int) -> int:
    """Returns the process, of ``count``, that a file of a checkpoint belongs to: process 0 has what all have written.

    Args:
        path: below the checkpoint's folder, with slashes.
        count: of the processes; those that wrote the checkpoint may be more.
    """
    own = re.match(rf"{ARRAYS}/ocdbt\.process_(\d+)/", path)
    return int(own[1]) % count if own else 0


class CheckpointPeers:
    """One checkpoint, as the processes of a run write it together. On the writer's thread.

    Args:
        exchange: of the run.
        key: of this checkpoint, the same in each process.
        index, count: of this process, and of all.
        give_up: raises if this process has to give up, since another one is lost or the run ends.
        earlier: keys of the checkpoints before, which process 0 deletes once all have begun this one, and adds this to.
    """

    def __init__(
        self,
        exchange: Exchange,
        key: str,
        index: int,
        count: int,
        give_up: Callable[[], None],
        earlier: list[str],
    ) -> None:
        self.index = index
        self.count = count
        self._exchange = exchange
        self._key = key
        self._give_up = give_up
        self._earlier = earlier
        self._said = 0
        self._attempts = 0

    # --- process 0 --------------------------------------------------------------------------------------------

    def begin(self, folder: Path) -> None:
        """Has the other processes write their parts into ``folder``."""
        self._attempts += 1
        self._say(Attempt(name=folder.name))

    def wait_for_parts(self) -> None:
        """Waits until every other process has written its part. Raises SnapshotError if one of them could not."""
        failed = [
            f"process {index}: {error}"
            for index in range(1, self.count)
            if (error := self._wait_for(f"part/{self._attempts}/{index}"))
        ]
        while self._earlier:
            self._exchange.delete(self._earlier.pop())
        if failed:
            raise SnapshotError(f"a part of the checkpoint could not be written by {'; '.join(failed)}")

    def conclude(self, outcome: CommittedByAll | GivenUp) -> None:
        """Tells the other processes that there is no further attempt."""
        self._say(outcome)
        self._earlier.append(self._key)

    def _say(self, message: Message) -> None:
        self._said += 1
        self._exchange.set(f"{self._key}/say/{self._said}", _MESSAGE.dump_json(message).decode())

    # --- the other processes ----------------------------------------------------------------------------------

    def next_message(self) -> Message:
        """Returns what process 0 says next. Waits for it."""
        self._said += 1
        message = _MESSAGE.validate_json(self._wait_for(f"say/{self._said}"))
        self._attempts += message.kind == "attempt"
        return message

    def report(self, error: str = "") -> None:
        """Tells process 0 that the part of this process is written, or why not."""
        self._exchange.set(f"{self._key}/part/{self._attempts}/{self.index}", error)

    def _wait_for(self, key: str) -> str:
        while (found := self._exchange.wait_for(f"{self._key}/{key}", EXCHANGE_POLL_S)) is None:
            self._give_up()
        return found
