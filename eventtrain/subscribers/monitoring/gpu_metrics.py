"""What NVIDIA's management library says about the GPUs of this host. Needs nvidia-ml-py; silent without a driver."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pynvml

QUESTIONS: dict[str, Callable[[Any], Any]] = {
    "utilization_percent": lambda gpu: pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu,
    "temperature_c": lambda gpu: pynvml.nvmlDeviceGetTemperature(gpu, pynvml.NVML_TEMPERATURE_GPU),
    "power_w": lambda gpu: pynvml.nvmlDeviceGetPowerUsage(gpu) / 1000,
    "memory_used_bytes": lambda gpu: pynvml.nvmlDeviceGetMemoryInfo(gpu).used,
    "memory_total_bytes": lambda gpu: pynvml.nvmlDeviceGetMemoryInfo(gpu).total,
}


class GpuReadings:
    """Reads all GPUs of the host, whoever uses them, in the order of NVML. One thread; may block; close it."""

    def __init__(self) -> None:
        self._gpus: list[Any] = []
        self._open = False
        try:
            pynvml.nvmlInit()
            self._open = True
            self._gpus = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        except pynvml.NVMLError:  # no driver, or no right to ask
            pass

    def read(self) -> dict[str, float]:
        """The figures of this moment, as ``gpu0_temperature_c``; what a GPU does not tell is left out."""
        found: dict[str, float] = {}
        for index, gpu in enumerate(self._gpus):
            for name, ask in QUESTIONS.items():
                try:
                    found[f"gpu{index}_{name}"] = ask(gpu)
                except pynvml.NVMLError:
                    continue
        return found

    def close(self) -> None:
        """Let go of the library. Idempotent."""
        if self._open:
            self._open = False
            pynvml.nvmlShutdown()
