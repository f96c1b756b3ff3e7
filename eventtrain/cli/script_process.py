"""Runs a script for ``eventtrain launch``: ``script_process.py PARENT_PID REPORT_FD SCRIPT ARGUMENTS...``.

It does what ``python SCRIPT ARGUMENTS...`` does, and two things more. Linux kills the process as soon as the thread
that started it is gone, for whatever reason. And a script that fails writes its exit code to REPORT_FD before the
interpreter ends, because JAX then waits up to five minutes for the other processes (``shutdown_timeout_seconds``).

This file is a program. It imports nothing of eventtrain, so that a script finds the interpreter as it is without it.
"""

import ctypes
import os
import signal
import sys
import types
from importlib.machinery import SourceFileLoader
from typing import Any

PR_SET_PDEATHSIG = 1


class _Script(SourceFileLoader):
    """The file as a program: no bytecode is written beside it."""

    def set_data(self, path: str, data: Any, *, _mode: int = 0o666) -> None:
        """Writes nothing."""


def _run() -> None:
    parent, report, path, *arguments = sys.argv[1:]
    os.set_inheritable(int(report), False)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(parent):  # it ended before the call above
            sys.exit(128 + signal.SIGKILL)
    sys.argv = [path, *arguments]
    sys.path[0] = os.path.dirname(os.path.abspath(path))
    module = types.ModuleType("__main__")
    module.__file__ = path
    sys.modules["__main__"] = module
    code = 0
    try:
        _Script("__main__", path).exec_module(module)
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException as error:
        # Without this file.
        traceback = error.__traceback__.tb_next if error.__traceback__ is not None else None
        sys.excepthook(type(error), error.with_traceback(traceback), traceback)
        code = 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    if code != 0:
        os.write(int(report), b"%d" % (code & 0xFF))
    sys.exit(code)


if __name__ == "__main__":
    _run()
