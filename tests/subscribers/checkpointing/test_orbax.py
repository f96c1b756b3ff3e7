from __future__ import annotations

import subprocess
import sys

from tests.conftest import python_path

SCRIPT = """
import logging
from eventtrain import subscribers as subs
subs.Checkpointer("checkpoints", every=1)
logging.basicConfig(level=logging.INFO, format="mine: %(message)s")
logging.getLogger("program").info("heard")
"""


def test_a_program_may_set_its_log_up_after_it_has_made_a_checkpointer() -> None:
    env = {"PYTHONPATH": python_path(), "JAX_PLATFORMS": "cpu", "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, timeout=240, check=True
    )
    assert "mine: heard" in done.stderr.splitlines()
