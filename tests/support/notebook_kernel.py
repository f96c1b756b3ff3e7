"""A real Jupyter kernel, and what it sends to the front end while it runs a cell."""

from __future__ import annotations

import os
import queue
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Output:
    """Messages of one cell, in their order: type and content."""

    messages: list[tuple[str, dict[str, Any]]]

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [content for name, content in self.messages if name == kind]

    @property
    def printed(self) -> str:
        return "".join(content["text"] for content in self.of("stream"))

    @property
    def shown(self) -> list[str]:
        """The outputs of the cell as a front end has them in the end: updates replace what they update."""
        shown: dict[str, str] = {}
        for name, content in self.messages:
            if name in ("display_data", "update_display_data"):
                assert name == "display_data" or content["transient"]["display_id"] in shown
                shown[content["transient"]["display_id"]] = content["data"]["text/html"]
        return list(shown.values())

    @property
    def error(self) -> str:
        return "\n".join(line for content in self.of("error") for line in content["traceback"])


class Kernel:
    """A running kernel of this interpreter, with this checkout in front of its path."""

    def __init__(self, manager: Any, client: Any) -> None:
        self.manager = manager
        self._client = client

    def run(self, cell: str, *, timeout_s: float = 120, interrupt_at: str | None = None) -> Output:
        """Run ``cell``; once it has printed ``interrupt_at``, interrupt it as the stop button does."""
        sent = self._client.execute(cell)
        messages: list[tuple[str, dict[str, Any]]] = []
        end_s = time.monotonic() + timeout_s
        while True:
            try:
                message = self._client.get_iopub_msg(timeout=max(0.0, end_s - time.monotonic()))
            except queue.Empty:
                raise TimeoutError(f"the cell has not ended after {timeout_s} s: {messages[-3:]}") from None
            kind, content = message["msg_type"], message["content"]
            assert message["parent_header"].get("msg_id") == sent, f"{kind} belongs to another cell"
            messages.append((kind, content))
            if interrupt_at is not None and kind == "stream" and interrupt_at in content["text"]:
                self.manager.interrupt_kernel()
            if kind == "status" and content["execution_state"] == "idle":
                return Output(messages)


@contextmanager
def kernel(folder: Path) -> Iterator[Kernel]:
    """Start a kernel that works in ``folder``; kill it in the end."""
    from jupyter_client.manager import KernelManager

    own = {"IPYTHONDIR": str(folder / "ipython"), "JUPYTER_RUNTIME_DIR": str(folder / "runtime")}
    sockets = tempfile.TemporaryDirectory()  # the path of a socket has to be short
    manager = KernelManager(transport="ipc", ip=f"{sockets.name}/k")
    manager.start_kernel(
        cwd=str(folder), env={**os.environ, **own, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    )
    client = manager.client()
    try:
        client.start_channels()
        client.wait_for_ready(timeout=120)
        yield Kernel(manager, client)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
        sockets.cleanup()
