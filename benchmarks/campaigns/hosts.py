"""Faults in a run of two processes: SIGKILL, SIGTERM, SIGSTOP, errors on one host. Each resumes as if undisturbed.

Most trials kill: one process, and the others shortly after it, as a launcher does, so that a trial does not wait until
the survivors have noticed. What survivors do by themselves is a trial of its own. The campaign ``hosts_four`` does the
same with four processes.
"""

from __future__ import annotations

import random
import signal
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import eventtrain as et
from benchmarks.campaign import Campaign
from benchmarks.killing.hosts import Job, compare, require_no_crash, server, undisturbed
from benchmarks.killing.hosts_job import LOG, OWN_LOG
from benchmarks.killing.jobs import require, rows

END_S = 45.0
"""No process outlives the loss of another one for longer: the times of docs/several-hosts.md, on a busy machine."""
WHOLE_S = 120.0
"""A whole job, on a busy machine."""
GRACE_S = 20.0
"""Grace period of a SIGTERM."""
SAVING = "checkpoints/.tmp-*"
PHASES = {"compile": "", "first": "first", "epoch": "", "eval": "", "save": ""}
"""Mark that each process has to reach -> the mark where it then waits."""
FULL = ("No space left on device", "File too large")
"""Texts by which a full disk is reported: its own, and that of the limit that stands for it."""
ABORTED = -signal.SIGABRT
"""How JAX ends a process whose coordinator is gone."""


def kill_in_save(folder: Path, rng: random.Random, count: int = 2) -> str:
    """Kills one process while a checkpoint is being written, and then the others."""
    job = server().start(folder, count=count)
    job.until(lambda: any(folder.glob(SAVING)) or job.has_ended(), "began to save")
    for _ in range(rng.randrange(5)):  # one of the first five saves
        job.until(lambda: not any(folder.glob(SAVING)) or job.has_ended(), "ended a save")
        job.until(lambda: any(folder.glob(SAVING)) or job.has_ended(), "began to save again")
    time.sleep(rng.uniform(0, 0.02))
    return _kill(job, rng)


def kill(folder: Path, rng: random.Random, count: int = 2) -> str:
    """Kills one process at a random moment, and then the others."""
    job = server().start(folder, count=count)
    job.wait_s(rng.uniform(0.3, 1.0) * undisturbed(count).took_s)
    return _kill(job, rng)


def _kill(job: Job, rng: random.Random) -> str:
    first, *others = rng.sample(range(len(job.processes)), len(job.processes))
    job.send(signal.SIGKILL, first)
    saving = any(job.folder.glob(SAVING))
    time.sleep(rng.choice([0, rng.uniform(0, 0.3)]))
    job.send(signal.SIGKILL, *others)
    ends = job.wait(END_S)
    if all(end.status == 0 for end in ends):
        return "too_late"
    require(ends[first].status == -signal.SIGKILL, f"it failed before it was killed: {ends} {job.output()}")
    return "killed_in_save" if saving else "killed"


def survive(folder: Path, rng: random.Random, count: int = 2) -> str:
    """Kills one process, and looks at the end of the others."""
    job, killed = server().start(folder, count=count), rng.randrange(count)
    job.reach(rng.choice(["epoch", "save", "eval"]))
    job.send(signal.SIGKILL, killed)
    ends = job.wait(END_S)
    for index in set(range(count)) - {killed}:
        status = ends[index].status
        require(status in (1, 75, ABORTED), f"{index} survived {killed} and ended with {ends} {job.output()}")
        if status != ABORTED:
            require_no_crash(job)
            kinds = [row["kind"] for row in rows(folder / OWN_LOG.format(index))]
            require({"peer_lost", "run_failed"} <= set(kinds[-4:]), f"its log ends with {kinds[-4:]}")
    return f"survived_{killed}"


def terminate(folder: Path, rng: random.Random, count: int = 2) -> str:
    """Sends SIGTERM to one process, or to all."""
    phase = rng.choice(list(PHASES))
    faults = {rng.randrange(count): "slow"} if phase == "epoch" and rng.random() < 0.5 else {}
    job = server().start(folder, count=count, hold=PHASES[phase], faults=faults)
    job.reach(phase)
    time.sleep(rng.uniform(0, 0.05))
    job.send(signal.SIGTERM, *rng.choice([(0,), (count - 1,), tuple(range(count))]))
    ends = job.wait(GRACE_S)
    require({end.status for end in ends} == {143}, f"in {phase} it ended with {ends} {job.output()}")
    require_no_crash(job)
    last = rows(folder / LOG)[-1]
    require(
        (last["kind"], last["reason"]) == ("run_completed", "preempted"),
        f"in {phase} its last event is {last}",
    )
    saved = sorted((folder / "checkpoints").glob("step-*"))
    newest = int(saved[-1].name.split("-")[1]) if saved else 0
    require(newest == last["step"], f"in {phase} it ended at {last['step']} and saved {saved}")
    return f"terminated_in_{phase}"


def stop(folder: Path, rng: random.Random, count: int = 2) -> str:
    """Stops one process for some seconds, after which the run continues."""
    job, stopped = server().start(folder, count=count), rng.randrange(count)
    job.reach(rng.choice(["compile", "epoch", "eval", "save"]))
    job.send(signal.SIGSTOP, stopped)
    time.sleep(rng.uniform(0.5, 4))
    job.send(signal.SIGCONT, stopped)
    ends = job.wait(WHOLE_S)
    require(not any(end.status for end in ends), f"it ended with {ends} {job.output()}")
    return "stopped"


def fail(folder: Path, rng: random.Random, count: int = 2) -> str:
    """Raises in the data or in a subscriber of one process."""
    failing, fault = rng.randrange(count), rng.choice(["data", "subscriber"])
    job = server().start(folder, count=count, faults={failing: fault})
    ends = job.wait(END_S)
    require(
        ends[failing].status == 1 and {end.status for end in ends} <= {1, 75, ABORTED},
        f"with {fault} in {failing} it ended with {ends} {job.output()}",
    )
    for index in range(count):
        failed = [row for row in rows(folder / OWN_LOG.format(index)) if row["kind"] == "run_failed"]
        require(len(failed) == 1, f"process {index} reports {failed}")
        is_other = failed[0]["error"].startswith("PeerLost: ")
        require(is_other == (index != failing), f"process {index} reports {failed}")
    return f"failed_by_{fault}"


def full_disk(folder: Path, rng: random.Random, count: int = 2) -> str:
    """Has one process fail to write its part of a checkpoint, until its retries are used up.

    By an error in place of a write, or on a disk that is full: a small file system of its own, where it may mount one,
    and otherwise a limit for the size of its files.
    """
    failing, fault = rng.randrange(count), rng.choice(["disk", "full_disk"])
    job = server().start(folder, count=count, faults={failing: fault})
    ends = job.wait(WHOLE_S)
    require(not any(end.status for end in ends), f"it ended with {ends} {job.output()}")
    for index in range(count):
        failed = [row for row in rows(folder / OWN_LOG.format(index)) if row["kind"] == "checkpoint_failed"]
        require(
            [row["step"] for row in failed] == [5] and any(text in failed[0]["error"] for text in FULL),
            f"with {fault} in {failing} process {index} reports {failed}",
        )
    saved = {int(path.name.split("-")[1]) for path in (folder / "checkpoints").glob("step-*")}
    require(saved == {10, 15, 20, 25, 30, 35, 36}, f"it saved {sorted(saved)}")
    return fault


Kind = Callable[[Path, random.Random, int], str]
KINDS: tuple[Kind, ...] = (
    kill_in_save, kill, kill_in_save, terminate, kill_in_save, fail, kill_in_save, kill,
    kill_in_save, terminate, kill_in_save, survive, kill_in_save, stop, kill_in_save, full_disk,
)  # fmt: skip


def trial(seed: int, count: int = 2) -> Mapping[str, int]:
    """Injects one fault, reads every committed checkpoint, resumes, and compares with the undisturbed run.

    Raises:
        AssertionError: a process ended otherwise than it should, a checkpoint cannot be read, or the resumed run
            differs.
    """
    undisturbed(count)
    return inject(KINDS[seed % len(KINDS)], seed, count)


def inject(kind: Kind, seed: int, count: int = 2) -> dict[str, int]:
    """Injects a fault of one kind. Returns counts."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        counts = {kind(folder, random.Random(seed), count): 1}
        counts["restorable"] = len([et.load_state(path) for path in (folder / "checkpoints").glob("step-*")])
        compare(folder, count)
    return counts


CAMPAIGN = Campaign(
    name="hosts",
    trial=trial,
    trials=500,
    slice=2,
    batch=8,
    least={"killed_in_save": 0.2},
    packages=("orbax-checkpoint",),
)
