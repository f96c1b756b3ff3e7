"""Measures one part in this process, for the suite: ``python -m benchmarks.part MODULE SECONDS quick|whole OUT``."""

from __future__ import annotations

import importlib
import json
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from time import monotonic

os.environ.setdefault(
    "TF_CPP_MIN_LOG_LEVEL", "3"
)  # the readers of TensorBoard would warn of a missing TensorFlow


def main(module: str, seconds: str, extent: str, out: str) -> None:
    """Writes the figures of ``module`` with the machine; ``seconds`` includes starting JAX."""
    began_s = monotonic()
    part = importlib.import_module(module)  # before JAX starts its backend: a part may set what it reads then
    from benchmarks import machine

    device = machine.device()
    budget_s = float(seconds) - (monotonic() - began_s)
    found = part.figures(device, budget_s, extent == "quick")
    name = module.rsplit(".", 1)[-1]
    document = {
        "slug": device.slug,
        "machine": machine.describe(),
        "figures": [asdict(replace(one, part=name)) for one in found],
    }
    Path(out).write_text(json.dumps(document))


if __name__ == "__main__":
    main(*sys.argv[1:])
