"""``DeviceStats``: use of the machine by a run, measured every few seconds in a thread of its own."""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Any

import jax

from eventtrain.errors import BusClosed, QueueFull
from eventtrain.events import MachineMeasured, RunCompleted, RunFailed
from eventtrain.subscribers._shared.worker_thread import WorkerThread
from eventtrain.subscribers.base import RunContext, Subscriber
from eventtrain.validation.annotations import checked
from eventtrain.validation.arguments import require_number
from eventtrain.validation.optional_imports import import_optional, require_installed

psutil = import_optional("psutil", extra="machine", used_by="DeviceStats")
pynvml = import_optional("pynvml", extra="machine", used_by="DeviceStats")

logger = logging.getLogger("eventtrain")

FINISH_S = 1.0
"""How long the end of a run waits for the last measurement: a driver may hang."""
SHORTEST_S = 0.1
"""CPU times are read off a clock of 10 ms: a percentage of less time than this would be meaningless."""
GPU_METRICS: dict[str, Callable[[Any], float]] = {
    "utilization_percent": lambda gpu: pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu,
    "temperature_c": lambda gpu: pynvml.nvmlDeviceGetTemperature(gpu, pynvml.NVML_TEMPERATURE_GPU),
    "power_w": lambda gpu: pynvml.nvmlDeviceGetPowerUsage(gpu) / 1000,
    "memory_used_bytes": lambda gpu: pynvml.nvmlDeviceGetMemoryInfo(gpu).used,
    "memory_total_bytes": lambda gpu: pynvml.nvmlDeviceGetMemoryInfo(gpu).total,
}
DEVICE_MEMORY = {
    "bytes_in_use": "memory_used_bytes",
    "peak_bytes_in_use": "memory_peak_bytes",
    "bytes_limit": "memory_limit_bytes",
}
"""JAX's name -> name of the metric."""


class DeviceStats(Subscriber):
    """Publishes a ``MachineMeasured`` at the start of a run, every ``every_s`` seconds, and at its end.

    Its ``metrics``, as far as this machine reports them:

    - ``host_cpu_percent`` (of all cores), ``process_cpu_percent`` (of one core), since the measurement before;
      ``process_rss_bytes``, ``host_memory_available_bytes``, ``host_memory_total_bytes``, ``disk_free_bytes`` (of the
      disk with ``run_dir``);
    - of each JAX device: ``device0_memory_used_bytes``, ``device0_memory_peak_bytes``, ``device0_memory_limit_bytes``;
    - of each NVIDIA GPU of the host: ``gpu0_utilization_percent``, ``gpu0_temperature_c``, ``gpu0_power_w``,
      ``gpu0_memory_used_bytes``, ``gpu0_memory_total_bytes``.

    In a run of several processes each of them measures. The events of the others reach process 0 with ``process`` set.

    A driver that hangs ends the measurements, and nothing else.

    Args:
        every_s: seconds between two measurements.

    Raises:
        ConfigurationError: psutil or nvidia-ml-py is not installed, or ``every_s`` is invalid.
    """

    events = (RunCompleted, RunFailed)
    per_host = True

    @checked
    def __init__(self, every_s: float = 10.0) -> None:
        require_installed(psutil)
        require_installed(pynvml)
        require_number("DeviceStats", "every_s", every_s, above=0)
        self._interval_s = every_s
        self._thread: _MeasuringThread | None = None

    async def start(self, run: RunContext) -> None:
        """Starts the thread that measures."""
        self._thread = _MeasuringThread(run, self.name or "DeviceStats", self._interval_s)
        self._thread.start()

    async def handle(self, event: RunCompleted | RunFailed) -> None:
        """Has the last measurement made; returns at once."""
        if self._thread is not None:
            self._thread.measure_last()

    async def finish(self) -> None:
        """Waits for the last measurement, at most a second."""
        thread, self._thread = self._thread, None
        if thread is not None and not await thread.finish_within(FINISH_S):
            logger.warning("%s: the last measurement took too long and is left out", thread.source)


class _MeasuringThread(WorkerThread):
    """Measures until it is finished."""

    def __init__(self, run: RunContext, source: str, interval_s: float) -> None:
        super().__init__(source, run.publish)
        self.source = source
        self._run_context = run
        self._interval_s = interval_s
        self._left_out = 0

    def measure_last(self) -> None:
        """Ends the thread after one more measurement. Never blocks."""
        self._jobs.put(None)

    def run(self) -> None:
        """Measures at once, then after each interval, and at the end."""
        machine = MachineReader(self._run_context.run_dir)
        try:
            while True:
                self._measure(machine)
                try:
                    self._jobs.get(timeout=self._interval_s)
                except queue.Empty:
                    continue
                self._measure(machine)
                return
        except BusClosed:
            pass
        except Exception:
            logger.exception("%s: the machine can no longer be measured", self.source)
        finally:
            machine.close()

    def _measure(self, machine: MachineReader) -> None:
        metrics = machine.read()
        if self.stopping.is_set():
            return
        step = self._run_context.loop_statistics().step
        try:
            self._publish(MachineMeasured(step=step, source=self.source, metrics=metrics))
        except QueueFull:  # not repeated: the next one is newer
            self._left_out += 1
            log = logger.warning if self._left_out == 1 else logger.debug
            log(
                "%s: a subscriber's queue is full; %d measurements were left out", self.source, self._left_out
            )


class MachineReader:
    """Reads the host, its GPUs and JAX's devices; what cannot be read is left out. Everything may block.

    One thread: psutil measures CPU time from one reading to the next.

    Args:
        folder: on the disk whose free space counts.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process = psutil.Process()
        self._read_s = monotonic()
        psutil.cpu_percent(None)
        self._process.cpu_percent(None)
        self._gpus: list[Any] = []
        self._has_nvml = False
        try:
            pynvml.nvmlInit()
            self._has_nvml = True
            self._gpus = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        except pynvml.NVMLError:  # no driver, or no permission
            pass

    def read(self) -> dict[str, float]:
        """Returns the current metrics by name."""
        found: dict[str, float] = {}
        for metrics in (self._cpu, self._memory, self._disk):
            try:
                found |= metrics()
            except (OSError, psutil.Error):
                continue
        return {**found, **device_memory(), **self.gpus()}

    def gpus(self) -> dict[str, float]:
        """Returns the metrics of all GPUs of the host, whichever process uses them, in the order of NVML."""
        found: dict[str, float] = {}
        for index, gpu in enumerate(self._gpus):
            for name, read in GPU_METRICS.items():
                try:
                    found[f"gpu{index}_{name}"] = read(gpu)
                except pynvml.NVMLError:
                    continue
        return found

    def close(self) -> None:
        """Ends NVML."""
        if self._has_nvml:
            pynvml.nvmlShutdown()

    def _cpu(self) -> dict[str, float]:
        if monotonic() - self._read_s < SHORTEST_S:
            return {}
        self._read_s = monotonic()
        return {
            "host_cpu_percent": psutil.cpu_percent(None),
            "process_cpu_percent": self._process.cpu_percent(None),
        }

    def _memory(self) -> dict[str, float]:
        memory = psutil.virtual_memory()
        return {
            "process_rss_bytes": self._process.memory_info().rss,
            "host_memory_available_bytes": memory.available,
            "host_memory_total_bytes": memory.total,
        }

    def _disk(self) -> dict[str, float]:
        return {"disk_free_bytes": psutil.disk_usage(str(self._folder)).free}


def device_memory() -> dict[str, float]:
    """Returns the memory of each JAX device that reports it, in bytes; the CPU does not."""
    found: dict[str, float] = {}
    for device in jax.local_devices():
        try:
            statistics: dict[str, Any] = device.memory_stats() or {}
        except (NotImplementedError, jax.errors.JaxRuntimeError):
            continue
        for key, name in DEVICE_MEMORY.items():
            if key in statistics:
                found[f"device{device.id}_{name}"] = statistics[key]
    return found
