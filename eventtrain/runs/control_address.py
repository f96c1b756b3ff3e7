"""Connections to the control socket of a run: where it is, how the run opens it, and how others connect to it.

A UNIX socket in run_dir, which only the user of the run may use. Its path has at most 107 bytes, so
a longer one is named through a descriptor of its folder, on Linux. Where there are no UNIX sockets (on Windows, on some
network file systems), the run listens on the loopback interface, and a file that only its user may read has the port
and a token.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from eventtrain.errors import RunNotReachable

SOCKET = "control.sock"
TOKEN = "control.token"
LONGEST_PATH = 100
"""In bytes: below the limits of Linux (107) and macOS (103)."""
LONGEST_LINE = 1 << 16
"""Of a request or an answer, in bytes."""
OF_THIS_PROCESS = Path("/proc/self/fd")


def listen(run_dir: Path) -> tuple[socket.socket, str | None]:
    """Opens the control socket of a run, which holds the lock of run_dir. A socket left by a killed run is replaced.

    Returns:
        The socket, and the token that a client must send; None where the file system says who may connect.

    Raises:
        OSError: neither kind of socket can be opened.
    """
    close(run_dir)
    try:
        return _listen_in(run_dir), None
    except (OSError, AttributeError):  # no UNIX sockets on this system, or on this file system
        return _listen_on_loopback(run_dir)


def close(run_dir: Path) -> None:
    """Removes what ``listen`` made in run_dir. Raises OSError if that cannot be removed."""
    for name in (SOCKET, TOKEN):
        (run_dir / name).unlink(missing_ok=True)


def _listen_in(run_dir: Path) -> socket.socket:
    opened = socket.socket(socket.AF_UNIX)
    name = f".{SOCKET}.new"
    try:
        with suppress(FileNotFoundError):
            (run_dir / name).unlink()
        with _short(run_dir, name) as path:
            opened.bind(path)
        (run_dir / name).chmod(0o600)  # before it listens, so that it is never open to others
        opened.listen(8)
        os.replace(run_dir / name, run_dir / SOCKET)
    except BaseException:
        opened.close()
        with suppress(OSError):
            (run_dir / name).unlink()
        raise
    return opened


def _listen_on_loopback(run_dir: Path) -> tuple[socket.socket, str]:
    opened, token = socket.create_server(("127.0.0.1", 0), backlog=8), secrets.token_urlsafe(32)
    temporary = run_dir / f".{TOKEN}.new"
    try:
        with suppress(FileNotFoundError):
            temporary.unlink()
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "w") as file:
            json.dump({"port": opened.getsockname()[1], "token": token}, file)
        os.replace(temporary, run_dir / TOKEN)
    except BaseException:
        opened.close()
        raise
    return opened, token


def connect(run_dir: Path, timeout_s: float) -> tuple[socket.socket, str | None]:
    """Returns a connection to the run in ``run_dir``, and the token that it wants first, if it wants one.

    Raises:
        RunNotReachable: no run serves a control socket there.
    """
    if not run_dir.is_dir():
        raise RunNotReachable(f"{run_dir} is not a folder. Give the run_dir of a run.")
    try:
        return _connect(run_dir, timeout_s)
    except PermissionError as error:
        raise RunNotReachable(f"The run in {run_dir} belongs to another user: {error.strerror}.") from error
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise RunNotReachable(
            f"No run answers in {run_dir}. It has ended, has not started yet, has no subscribers (and so writes "
            "nothing to run_dir), or was made with Trainer(remote_control=False)."
        ) from error


def _connect(run_dir: Path, timeout_s: float) -> tuple[socket.socket, str | None]:
    if (run_dir / TOKEN).exists():
        found: dict[str, Any] = json.loads((run_dir / TOKEN).read_text())
        return socket.create_connection(("127.0.0.1", int(found["port"])), timeout_s), str(found["token"])
    opened = socket.socket(socket.AF_UNIX)
    try:
        opened.settimeout(timeout_s)
        with _short(run_dir, SOCKET) as path:
            opened.connect(path)
    except BaseException:
        opened.close()
        raise
    return opened, None


@contextmanager
def _short(folder: Path, name: str) -> Generator[str]:
    """Gives the path of ``folder / name`` in few enough bytes, for the length of the block. Raises OSError."""
    path = os.fspath(folder / name)
    if len(os.fsencode(path)) <= LONGEST_PATH:
        yield path
        return
    if not OF_THIS_PROCESS.is_dir():
        raise OSError(f"the path of a UNIX socket must have at most {LONGEST_PATH} bytes: {path}")
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"{OF_THIS_PROCESS}/{descriptor}/{name}"
    finally:
        os.close(descriptor)
