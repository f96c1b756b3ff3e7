"""Failures of the device: whether JAX has raised an error, and what was in the memory when it was exhausted."""

from __future__ import annotations

import logging
from pathlib import Path

import jax

logger = logging.getLogger("eventtrain")


def is_raised_by_jax(error: BaseException) -> bool:
    """Returns whether JAX has raised ``error``, and not a function of the user or of eventtrain."""
    traceback, module = error.__traceback__, ""
    while traceback is not None:
        module, traceback = traceback.tb_frame.f_globals.get("__name__", ""), traceback.tb_next
    return module.partition(".")[0] in ("jax", "jaxlib")


def save_memory_profile(error: BaseException, run_dir: Path, step: int) -> str:
    """Saves what is in the memory of the devices, if ``error`` is that it was exhausted. Returns where, else ""."""
    if not isinstance(error, jax.errors.JaxRuntimeError) or "RESOURCE_EXHAUSTED" not in str(error):
        return ""
    path = run_dir / f"memory-step-{step:08}-process-{jax.process_index()}.prof"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        jax.profiler.save_device_memory_profile(str(path))
    except (OSError, RuntimeError) as failed:
        logger.error("The memory of the devices was not saved to %s: %s", path, failed)
        return ""
    logger.error("The memory of a device was exhausted at step %d.", step)
    return f"What was in the memory of the devices is in {path}, for `pprof -top`."
