"""`eventtrain launch` with real processes, most of them without jax."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from eventtrain.cli.processes import process_environment, reserved_port
from eventtrain.errors import ConfigurationError
from tests.conftest import python_path
from tests.support.several_processes import run_processes

# What started the tests may have had them ignore signals, as nohup does, and the launcher would leave those alone.
HEARD = "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL); signal.signal(signal.SIGINT, signal.SIG_DFL); "
IGNORED = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN); "
APP = "from eventtrain.cli import app; app()"
LAUNCH = [sys.executable, "-c", HEARD + APP, "launch"]
RANK = "import os, sys\nrank = int(os.environ['JAX_PROCESS_ID'])\n"
# In short pieces: Python sleeps through a signal that arrives between its last look and the system call.
UNTIL_SIGNALLED = "while True:\n    time.sleep(0.02)\n"
WAITS = RANK + "print('ready', flush=True)\nimport time\n" + UNTIL_SIGNALLED

Launch = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    """Starts `eventtrain launch` with the options before the script, and the arguments after it."""
    started: list[subprocess.Popen[str]] = []

    def launch(
        text: str, *options: str, arguments: tuple[str, ...] = (), signals: str = HEARD
    ) -> subprocess.Popen[str]:
        path = tmp_path / "train_it.py"
        path.write_text(textwrap.dedent(text))
        process = subprocess.Popen(
            [sys.executable, "-c", signals + APP, "launch", *options, str(path), *arguments],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": python_path()},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield launch
    for process in started:
        process.kill()
        process.communicate()


def lines_until_ready(process: subprocess.Popen[str], n: int = 2) -> list[str]:
    """Waits for a line with `ready` from each process."""
    assert process.stdout is not None
    lines: list[str] = []
    while sum("ready" in line for line in lines) < n:
        line = process.stdout.readline()
        assert line, f"the launcher ended after {lines}: {process.stderr and process.stderr.read()}"
        lines.append(line.rstrip("\n"))
    return lines


def wait_until_gone(pids: list[int]) -> None:
    deadline_s = time.monotonic() + 20
    while remaining := [pid for pid in pids if is_running(pid)]:
        assert time.monotonic() < deadline_s, f"{remaining} are still running"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_plain_initialize_joins_the_processes_and_a_psum_covers_their_devices() -> None:
    ended = run_processes(
        2,
        """
        import jax
        import numpy as np
        from jax.sharding import NamedSharding, PartitionSpec as P

        jax.distributed.initialize()
        mesh = jax.make_mesh((4,), ("data",))
        place = NamedSharding(mesh, P("data"))
        values = np.arange(4, dtype=np.float32)
        array = jax.make_array_from_callback((4,), place, lambda index: values[index])
        add = jax.shard_map(lambda x: jax.lax.psum(x, "data"), mesh=mesh, in_specs=P("data"), out_specs=P())
        print(jax.process_index(), jax.process_count(), jax.local_device_count(), float(jax.jit(add)(array)[0]))
        """,
        devices=2,
    )
    assert [one.exit_code for one in ended] == [0, 0]
    assert [one.stdout.splitlines()[-1] for one in ended] == ["0 2 2 6.0", "1 2 2 6.0"]


def test_each_line_begins_with_its_process_and_the_script_has_its_arguments(launch: Launch) -> None:
    text = RANK + "print(f'line {rank} {sys.argv[1:]}\\nsecond')\nprint('problem', file=sys.stderr)\n"
    process = launch(text, "-n", "3", arguments=("--lr", "1", "-n", "5"))
    stdout, stderr = process.communicate(timeout=60)
    expected = [
        f"[{i}] {line}" for i in range(3) for line in (f"line {i} ['--lr', '1', '-n', '5']", "second")
    ]
    assert sorted(stdout.splitlines()) == sorted(expected)
    assert sorted(stderr.splitlines()) == [f"[{i}] problem" for i in range(3)]
    assert process.returncode == 0


def test_a_script_runs_as_python_runs_it(launch: Launch, tmp_path: Path) -> None:
    (tmp_path / "beside_it.py").write_text("value = 3")
    text = """
    import atexit, pickle, sys, beside_it
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context
    def double(x):
        return 2 * x
    class Model: pass
    if __name__ == "__main__":
        assert pickle.loads(pickle.dumps(Model())).__class__ is Model
        assert __file__.endswith("train_it.py") and sys.argv == [__file__]
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            assert pool.submit(double, 4).result() == 8
        atexit.register(print, "at exit")
        print("tail without an end", end="")
        sys.exit("a message")
    """
    process = launch(text, "-n", "1")
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout, stderr) == (1, "[0] tail without an endat exit\n", "[0] a message\n")
    assert [*tmp_path.glob("__pycache__/train_it*")] == []


def test_the_traceback_of_a_script_begins_in_the_script(launch: Launch) -> None:
    process = launch("1 / 0", "-n", "1")
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert re.findall(r'File ".*/(\w+\.py)"', stderr) == ["train_it.py"]
    assert "[0] ZeroDivisionError: division by zero" in stderr


def test_the_first_process_that_fails_decides_and_the_others_get_sigterm(launch: Launch) -> None:
    text = (
        RANK
        + """
import signal, time
if rank == 0:
    print("ready", flush=True)
    sys.exit(7)
def end(*_):
    print("saved", flush=True)
    sys.exit(9)
signal.signal(signal.SIGTERM, end)
"""
        + UNTIL_SIGNALLED
    )
    process = launch(text, "-n", "2", "--grace-s", "60")
    stdout, _ = process.communicate(timeout=60)
    assert (process.returncode, sorted(stdout.splitlines())) in (
        (7, ["[0] ready", "[1] saved"]),
        (7, ["[0] ready"]),  # it failed before the other one had its handler
    )


def test_who_ignores_sigterm_is_killed_after_the_grace_time(launch: Launch) -> None:
    text = (
        RANK
        + """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(os.getpid(), "ready", flush=True)
if rank == 1:
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(100)
"""
    )
    process = launch(text, "-n", "2", "--grace-s", "0.2")
    pids = [int(line.split()[1]) for line in lines_until_ready(process)]
    assert process.wait(timeout=60) == 128 + signal.SIGKILL
    wait_until_gone(pids)


def test_a_failure_is_seen_while_the_interpreter_still_waits_for_the_other_processes(launch: Launch) -> None:
    text = (
        RANK
        + """
import atexit, time
if rank == 1:
    atexit.register(time.sleep, 100)  # as jax.distributed.shutdown does
    sys.exit(5)
time.sleep(100)
"""
    )
    began_s = time.monotonic()
    process = launch(text, "-n", "2", "--grace-s", "0.5")
    process.communicate(timeout=60)
    assert process.returncode == 5
    assert time.monotonic() - began_s < 50


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_passed_on_once_and_waited_for(launch: Launch, number: signal.Signals) -> None:
    text = (
        RANK
        + f"""
import signal, time
received = []
signal.signal({int(number)}, lambda *_: received.append(1))
signal.signal(signal.SIGTERM, lambda *_: received.append(1))
print("ready", flush=True)
while not received:
    time.sleep(0.01)
time.sleep(0.3 * (1 + rank))  # the first one has ended by then, with a code that is not 0
print("received", len(received))
sys.exit(10 + rank)
"""
    )
    process = launch(text, "-n", "2")
    lines_until_ready(process)
    os.kill(process.pid, number)
    stdout, _ = process.communicate(timeout=60)
    assert sorted(stdout.splitlines()) == ["[0] received 1", "[1] received 1"]
    assert process.returncode == 10


def test_ctrl_c_ends_scripts_that_do_not_handle_it_with_130(launch: Launch) -> None:
    process = launch(WAITS, "-n", "2")
    lines_until_ready(process)
    os.kill(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr.count("KeyboardInterrupt") == 2


def test_a_signal_that_nohup_has_it_ignore_ends_neither_launcher_nor_processes(launch: Launch) -> None:
    text = (
        RANK
        + """
import signal, time
assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
print("ready", flush=True)
time.sleep(0.5)
"""
    )
    process = launch(text, "-n", "2", signals=IGNORED)
    lines_until_ready(process)
    os.kill(process.pid, signal.SIGHUP)
    assert process.wait(timeout=60) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_no_process_outlives_a_launcher_that_is_killed(launch: Launch) -> None:
    process = launch(WAITS.replace("'ready'", "os.getpid(), 'ready'"), "-n", "2")
    pids = [int(line.split()[1]) for line in lines_until_ready(process)]
    process.kill()
    wait_until_gone(pids)


def test_what_a_script_started_ends_with_it(launch: Launch) -> None:
    text = """
    import subprocess, sys
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    print(child.pid, flush=True)
    """
    process = launch(text, "-n", "2")
    stdout, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    wait_until_gone([int(line.split()[1]) for line in stdout.splitlines()])


def test_a_reader_that_leaves_does_not_end_training(launch: Launch) -> None:
    process = launch(WAITS.replace(UNTIL_SIGNALLED, "[print(i) for i in range(20_000)]; sys.exit(3)"))
    lines_until_ready(process)
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(timeout=60) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-n", "0", "x.py"], "--processes"),
        (["-n", "2", "missing.py"], "missing.py is not a file"),
        (
            ["--gpu", "--devices-per-process", "2", __file__],
            "expected --gpu or --devices-per-process, not both",
        ),
    ],
)
def test_wrong_options_are_refused(options: list[str], message: str, tmp_path: Path) -> None:
    env = os.environ | {"PYTHONPATH": python_path(), "COLUMNS": "200"}
    done = subprocess.run([*LAUNCH, *options], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr


def test_each_process_has_one_gpu_of_those_that_are_visible() -> None:
    given = {"CUDA_VISIBLE_DEVICES": "3,GPU-5a", "XLA_FLAGS": "--x"}
    envs = [process_environment(index, 2, 1, devices=None, given=given) for index in range(2)]
    assert [env["CUDA_VISIBLE_DEVICES"] for env in envs] == ["3", "GPU-5a"]
    assert [env["JAX_LOCAL_DEVICE_IDS"] for env in envs] == ["0", "0"]
    assert [env["XLA_FLAGS"] for env in envs] == ["--x", "--x"]
    assert all("JAX_PLATFORMS" not in env for env in envs)
    with pytest.raises(ConfigurationError, match=r"3 processes need one GPU each, but .* lists 2"):
        process_environment(0, 3, 1, devices=None, given=given)
    assert process_environment(1, 2, 1, devices=None, given={})["CUDA_VISIBLE_DEVICES"] == "1"


def test_cpu_devices_replace_a_number_that_was_forced_before_and_other_flags_stay() -> None:
    given = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_x=1", "HTTPS_PROXY": "x"}
    env = process_environment(1, 2, 1234, devices=3, given=given)
    assert env["XLA_FLAGS"].split() == ["--xla_x=1", "--xla_force_host_platform_device_count=3"]
    assert (env["JAX_PLATFORMS"], env["JAX_COORDINATOR_BIND_ADDRESS"]) == ("cpu", "127.0.0.1:1234")
    assert env["no_grpc_proxy"] == "127.0.0.1"


def test_a_reserved_port_is_given_to_no_other_socket() -> None:
    import socket

    with reserved_port() as port, socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", port))


def test_a_run_that_takes_too_long_fails_with_the_output_and_leaves_no_process() -> None:
    with pytest.raises(
        pytest.fail.Exception, match=r"(?s)2 processes were not finished after 3 s.*\[1\] \d+ ready"
    ):
        run_processes(2, WAITS.replace("'ready'", "os.getpid(), 'ready'"), timeout_s=3)


def test_an_exit_code_fails_the_test_unless_it_is_asked_for() -> None:
    assert [one.exit_code for one in run_processes(1, "exit(4)", check=False)] == [4]
    with pytest.raises(pytest.fail.Exception, match=r"1 processes ended with \{0: 4\}"):
        run_processes(1, "exit(4)")
