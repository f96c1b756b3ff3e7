"""``DeviceStats``: what the machine of a run has to give, measured every few seconds in a thread of its own."""

from __future__ import annotations

import logging
import threading
from functools import partial

from eventtrain.errors import BusClosed, ConfigurationError, QueueFull
from eventtrain.events import MachineMeasured, RunCompleted, RunFailed
from eventtrain.subscribers._shared.validation import require_number
from eventtrain.subscribers._shared.worker_thread import in_own_thread
from eventtrain.subscribers.base import RunContext, Subscriber

try:
    from eventtrain.subscribers.monitoring import gpu_metrics as gpu_readings
    from eventtrain.subscribers.monitoring import host_metrics as host_readings
except ModuleNotFoundError:
    gpu_readings = host_readings = None

logger = logging.getLogger("eventtrain")

FINISH_S = 1.0
"""How long the end of a run waits for the last measurement: a driver may hang."""


class DeviceStats(Subscriber):
    """Publishes a ``MachineMeasured`` at the start of a run, every ``every_s`` seconds, and at its end.

    Its ``metrics``, as far as this machine tells them:

    - ``host_cpu_percent`` (of all cores), ``process_cpu_percent`` (of one core), since the measurement before;
      ``process_rss_bytes``, ``host_memory_available_bytes``, ``host_memory_total_bytes``, ``disk_free_bytes`` (where
      ``run_dir`` lies);
    - of each JAX device: ``device0_memory_used_bytes``, ``device0_memory_peak_bytes``, ``device0_memory_limit_bytes``;
    - of each NVIDIA GPU of the host: ``gpu0_utilization_percent``, ``gpu0_temperature_c``, ``gpu0_power_w``,
      ``gpu0_memory_used_bytes``, ``gpu0_memory_total_bytes``.

    It measures in a thread of its own. A driver that hangs stops the measuring, and nothing else.

    Args:
        every_s: seconds between two measurements.

    Raises:
        ConfigurationError: psutil or nvidia-ml-py is missing, or ``every_s`` cannot work.
    """

    events = (RunCompleted, RunFailed)

    def __init__(self, every_s: float = 10.0) -> None:
        if host_readings is None:
            raise ConfigurationError(
                "DeviceStats needs psutil and nvidia-ml-py. Install them: pip install 'eventtrain[machine]'."
            )
        require_number("DeviceStats", "every_s", every_s, above=0)
        self._interval_s = every_s
        self._thread: _MeasuringThread | None = None

    async def start(self, run: RunContext) -> None:
        """Begin to measure."""
        self._thread = _MeasuringThread(run, self.name or "DeviceStats", self._interval_s)
        self._thread.start()

    async def handle(self, event: RunCompleted | RunFailed) -> None:
        """The run has ended: measure once more."""
        if self._thread is not None:
            self._thread.ending.set()

    async def finish(self) -> None:
        """Wait a moment for the last measurement."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        thread.ending.set()
        await in_own_thread(partial(thread.join, FINISH_S))
        if thread.is_alive():
            thread.given_up.set()
            logger.warning("%s: the last measurement took too long and is left out", thread.source)


class _MeasuringThread(threading.Thread):
    """A daemon: a measurement that hangs does not keep the program from ending."""

    def __init__(self, run: RunContext, source: str, interval_s: float) -> None:
        super().__init__(name=f"eventtrain {source}", daemon=True)
        self.source = source
        self._run_context = run
        self._interval_s = interval_s
        self.ending = threading.Event()
        """Measure once more, and end."""
        self.given_up = threading.Event()
        """Nobody waits for a measurement any more."""
        self._left_out = 0

    def run(self) -> None:
        """Measure until the run has ended."""
        assert host_readings is not None
        assert gpu_readings is not None
        host = host_readings.HostReadings(self._run_context.run_dir)
        gpus = gpu_readings.GpuReadings()
        try:
            going_on = True
            while going_on:
                going_on = not self.ending.is_set()
                self._say({**host.read(), **host_readings.device_memory(), **gpus.read()})
                if going_on:
                    self.ending.wait(self._interval_s)
        except BusClosed:
            pass
        except Exception:
            logger.exception("%s: the machine cannot be measured any more", self.source)
        finally:
            gpus.close()

    def _say(self, metrics: dict[str, float]) -> None:
        if self.given_up.is_set():
            return
        step = self._run_context.loop_statistics().step
        try:
            self._run_context.publish(MachineMeasured(step=step, source=self.source, metrics=metrics))
        except QueueFull:  # the next one says more than this one would by then
            self._left_out += 1
            log = logger.warning if self._left_out == 1 else logger.debug
            log(
                "%s: a subscriber's queue is full; %d measurements were left out", self.source, self._left_out
            )
