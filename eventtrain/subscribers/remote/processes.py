"""How the processes of a run upload one checkpoint together: each host sends the files that it has written.

Process 0 says which checkpoint is next and where it goes. Each other process sends its files, and answers with what it
has sent, or why it could not. Process 0 sends the rest, and writes the manifest when all have answered. Every wait ends
when a process is lost, or when this one gives up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from eventtrain.control.run_context import EXCHANGE_POLL_S, Exchange
from eventtrain.errors import StorageError
from eventtrain.events.models import Frozen
from eventtrain.subscribers.remote.upload_manifest import UploadedFile


class PartRequest(Frozen):
    """Send your files of a checkpoint.

    Attributes:
        path: of the checkpoint: relative to run_dir if it is in there.
        name: of its folder in the store.
    """

    path: str
    name: str


class PartAnswer(Frozen):
    """The files that a process has sent, or an error."""

    files: tuple[UploadedFile, ...] = ()
    error: str = ""


class UploadPeers:
    """The uploads of one run, as its processes make them together. On the thread that uploads.

    Args:
        exchange: of the run.
        key: of the Uploader, the same in each process.
        index, count: of this process, and of all.
        give_up: raises if this process has to give up.
    """

    def __init__(
        self, exchange: Exchange, key: str, index: int, count: int, give_up: Callable[[], None]
    ) -> None:
        self.index = index
        self.count = count
        self._exchange = exchange
        self._key = key
        self._give_up = give_up
        self._number = 0
        self._earlier: list[int] = []

    # --- process 0 --------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Tells the other processes that requests will come, and an end."""
        self._exchange.set(f"{self._key}/open", "")

    def begin(self, request: PartRequest) -> None:
        """Has the other processes send their files of the next checkpoint."""
        self._number += 1
        self._earlier.append(self._number)
        self._exchange.set(f"{self._key}/{self._number}/request", request.model_dump_json())

    def wait_for_parts(self) -> list[UploadedFile]:
        """Returns what the other processes have sent. Raises StorageError if one of them could not."""
        answers = [
            PartAnswer.model_validate_json(self._wait_for(f"{self._number}/{index}"))
            for index in range(1, self.count)
        ]
        while self._earlier:  # they are past those before, too
            self._exchange.delete(f"{self._key}/{self._earlier.pop()}")
        failed = [f"process {index}: {one.error}" for index, one in enumerate(answers, 1) if one.error]
        if failed:
            raise StorageError(f"a part of it could not be sent by {'; '.join(failed)}")
        return [file for answer in answers for file in answer.files]

    def end(self) -> None:
        """Tells the other processes that there are no further checkpoints."""
        self._exchange.set(f"{self._key}/{self._number + 1}/request", "")

    # --- the other processes ----------------------------------------------------------------------------------

    def is_opened(self, ends: Callable[[], bool]) -> bool:
        """Returns True once process 0 has called ``open``; False if ``ends()`` before. Waits for it."""
        while self._exchange.wait_for(f"{self._key}/open", EXCHANGE_POLL_S) is None:
            if ends():
                return False
        return True

    def next_request(self) -> PartRequest | None:
        """Returns what to send next; None at the end. Waits for it."""
        self._number += 1
        text = self._wait_for(f"{self._number}/request")
        return PartRequest.model_validate_json(text) if text else None

    def answer(self, files: Sequence[UploadedFile] = (), error: str = "") -> None:
        """Tells process 0 what was sent, or why nothing was."""
        answer = PartAnswer(files=tuple(files), error=error)
        self._exchange.set(f"{self._key}/{self._number}/{self.index}", answer.model_dump_json())

    def _wait_for(self, key: str) -> str:
        while (found := self._exchange.wait_for(f"{self._key}/{key}", EXCHANGE_POLL_S)) is None:
            self._give_up()
        return found
