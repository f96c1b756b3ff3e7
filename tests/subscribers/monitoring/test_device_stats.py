"""What DeviceStats publishes, against psutil's own readings; NVML is faked, since it needs a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import psutil
import pynvml
import pytest

import eventtrain as et
from eventtrain import subscribers as subs
from eventtrain.subscribers.monitoring import device_stats
from tests.conftest import python_path
from tests.support.models import batches, make_trainer, record


def with_stats(tmp_path: Path, every_s: float = 60.0) -> tuple[et.Trainer, list[Any]]:
    trainer = make_trainer(tmp_path, subscribers=[subs.DeviceStats(every_s)])
    return trainer, record(trainer, et.MachineMeasured)


async def test_a_short_run_is_measured_at_its_start_and_at_its_end(tmp_path: Path) -> None:
    trainer, seen = with_stats(tmp_path)
    await trainer.fit_async(batches(5), epochs=1)
    first, last = seen
    assert first.step == 0
    assert last.step == 5
    assert first.source == last.source == "DeviceStats"


def test_the_figures_are_those_that_psutil_reads(tmp_path: Path) -> None:
    trainer, seen = with_stats(tmp_path)
    trainer.fit(batches(5), epochs=1)
    metrics = seen[-1].metrics
    rss, disk = psutil.Process().memory_info().rss, psutil.disk_usage(str(tmp_path)).free
    assert 0.5 * rss < metrics["process_rss_bytes"] < 2 * rss
    assert metrics["disk_free_bytes"] == pytest.approx(disk, rel=0.2)
    assert metrics["host_memory_total_bytes"] == psutil.virtual_memory().total
    assert 0 < metrics["host_memory_available_bytes"] <= metrics["host_memory_total_bytes"]


def test_cpu_percentages_come_with_the_second_measurement_and_are_of_this_process(tmp_path: Path) -> None:
    trainer, seen = with_stats(tmp_path, every_s=0.3)
    enough = threading.Event()

    @trainer.on(et.MachineMeasured, where=lambda event: "process_cpu_percent" in event.metrics)
    async def stop(event: et.MachineMeasured) -> None:
        enough.set()
        trainer.control.stop("measured")

    def busy(epoch: int) -> Any:
        batch = batches(1)[0]
        while not enough.is_set():
            yield batch

    trainer.fit(busy, epochs=1)
    assert "host_cpu_percent" not in seen[0].metrics
    measured = next(event.metrics for event in seen if "process_cpu_percent" in event.metrics)
    assert 1 < measured["process_cpu_percent"] <= 100 * (os.cpu_count() or 1) + 20
    assert 0 < measured["host_cpu_percent"] <= 100


def test_without_a_gpu_and_on_a_cpu_their_figures_are_left_out(tmp_path: Path) -> None:
    trainer, seen = with_stats(tmp_path)
    trainer.fit(batches(2), epochs=1)
    assert not [name for event in seen for name in event.metrics if name.startswith(("gpu", "device"))]


def test_what_jax_tells_of_a_device_is_read_and_what_it_does_not_is_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    full = {"bytes_in_use": 10, "peak_bytes_in_use": 20, "bytes_limit": 100, "num_allocs": 3}
    devices = [
        SimpleNamespace(id=0, memory_stats=lambda: full),
        SimpleNamespace(id=1, memory_stats=lambda: None),
        SimpleNamespace(id=2, memory_stats=lambda: {"bytes_in_use": 5}),
    ]
    monkeypatch.setattr(device_stats.jax, "local_devices", lambda: devices)
    assert device_stats.device_memory() == {
        "device0_memory_used_bytes": 10,
        "device0_memory_peak_bytes": 20,
        "device0_memory_limit_bytes": 100,
        "device2_memory_used_bytes": 5,
    }


class FakeNVML:
    """Two GPUs, of which the second one knows no power."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = False
        answers = {
            "nvmlInit": lambda: setattr(self, "open", True),
            "nvmlShutdown": lambda: setattr(self, "open", False),
            "nvmlDeviceGetCount": lambda: 2,
            "nvmlDeviceGetHandleByIndex": lambda index: index,
            "nvmlDeviceGetUtilizationRates": lambda gpu: SimpleNamespace(gpu=90 + gpu),
            "nvmlDeviceGetTemperature": lambda gpu, sensor: 60 + gpu,
            "nvmlDeviceGetPowerUsage": self.power,
            "nvmlDeviceGetMemoryInfo": lambda gpu: SimpleNamespace(used=7, total=8),
        }
        for name, answer in answers.items():
            monkeypatch.setattr(pynvml, name, answer)

    @staticmethod
    def power(gpu: int) -> int:
        if gpu == 1:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return 350_500


def test_gpus_are_read_through_nvml_and_what_one_does_not_tell_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvml = FakeNVML(monkeypatch)
    trainer, seen = with_stats(tmp_path)
    trainer.fit(batches(2), epochs=1)
    found = {name: value for name, value in seen[-1].metrics.items() if name.startswith("gpu")}
    assert found == {
        "gpu0_utilization_percent": 90,
        "gpu0_temperature_c": 60,
        "gpu0_power_w": 350.5,
        "gpu0_memory_used_bytes": 7,
        "gpu0_memory_total_bytes": 8,
        "gpu1_utilization_percent": 91,
        "gpu1_temperature_c": 61,
        "gpu1_memory_used_bytes": 7,
        "gpu1_memory_total_bytes": 8,
    }
    assert not nvml.open


def test_it_measures_on_a_thread_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: set[str] = set()
    read = device_stats.MachineReader.read

    def noting(self: Any) -> Any:
        threads.add(threading.current_thread().name)
        return read(self)

    monkeypatch.setattr(device_stats.MachineReader, "read", noting)
    trainer, _ = with_stats(tmp_path)
    trainer.fit(batches(2), epochs=1)
    assert threads == {"eventtrain DeviceStats"}


async def test_a_driver_that_hangs_delays_the_end_by_a_second_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hanging = threading.Event()
    monkeypatch.setattr(device_stats.MachineReader, "gpus", lambda self: hanging.wait(60) and {})
    trainer, seen = with_stats(tmp_path)
    try:
        with anyio.fail_after(20):
            await trainer.fit_async(batches(3), epochs=1)
    finally:
        hanging.set()
    assert seen == []
    assert "the last measurement took too long" in caplog.text


async def test_a_full_queue_costs_measurements_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(tmp_path, subscribers=[subs.DeviceStats(0.01)])
    release = threading.Event()

    @trainer.on(et.MachineMeasured, queue=et.Lossless(1))
    def stuck(event: et.MachineMeasured) -> None:
        release.wait(20)

    def until_said(epoch: int) -> Any:
        batch = batches(1)[0]
        while "measurements were left out" not in caplog.text:
            yield batch
        release.set()

    result = await trainer.fit_async(until_said, epochs=1)
    assert result.stop_reason == "completed"


def test_a_disk_that_cannot_be_read_costs_its_own_figure_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: str) -> Any:
        raise OSError("the disk is gone")

    monkeypatch.setattr(psutil, "disk_usage", broken)
    found = device_stats.MachineReader(tmp_path).read()
    assert "disk_free_bytes" not in found
    assert found["process_rss_bytes"] > 0


@pytest.mark.parametrize("every_s", [0, -1, float("nan"), True, "10"])
def test_an_interval_that_cannot_work_is_refused_by_name(every_s: Any) -> None:
    with pytest.raises(et.ConfigurationError, match=r"DeviceStats\(every_s="):
        subs.DeviceStats(every_s)


@pytest.mark.parametrize("package", ["psutil", "pynvml"])
def test_a_missing_package_is_named_with_its_extra(package: str) -> None:
    script = f"""
import sys
sys.modules[{package!r}] = None
import eventtrain as et
from eventtrain import subscribers as subs
try:
    subs.DeviceStats()
except et.ConfigurationError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": python_path()},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "pip install 'eventtrain[machine]'" in done.stdout


def test_the_module_is_loaded_when_it_is_asked_for() -> None:
    assert subs.DeviceStats is device_stats.DeviceStats
