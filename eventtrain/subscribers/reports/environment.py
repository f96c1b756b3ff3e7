"""What a run was computed with: versions and devices, and nothing that says whose machine it was."""

from __future__ import annotations

import os
import platform
from collections import Counter
from importlib.metadata import PackageNotFoundError, version

import jax

from eventtrain._version import __version__

PACKAGES = ("jax", "jaxlib", "optax", "orbax-checkpoint", "numpy")


def environment() -> dict[str, str]:
    """Name -> value. No host, user, path or environment variable. Any thread, once JAX has a backend."""
    facts = {
        "Python": f"{platform.python_version()} ({platform.python_implementation()})",
        "eventtrain": __version__,
    }
    for package in PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "not installed as a package"
    kinds = Counter(device.device_kind for device in jax.local_devices())
    facts["devices"] = ", ".join(f"{count} × {kind}" for kind, count in kinds.items())
    facts["backend"] = jax.default_backend()
    if jax.process_count() > 1:
        facts["processes"] = str(jax.process_count())
    facts["system"] = f"{platform.system()}, {platform.machine()}"
    facts["host cores"] = _cores()
    return facts


def _cores() -> str:
    there = os.cpu_count() or 0
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else there
    return str(there) if usable == there else f"{usable} of {there}"
