"""Applies each mutant of mutants.toml to a copy of the tree and requires that its tests fail there.

    python tests/mutants/run.py [--only NAME ...] [--list]

A test that stays green with its mechanism removed proves nothing, so a surviving mutant ends this with 1.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MUTANTS = Path(__file__).with_name("mutants.toml")

GREEN, RED = "green", "red"


class BadMutant(Exception):
    """An entry of mutants.toml that cannot be applied or judged: it is out of date or malformed."""


@dataclass(frozen=True)
class Mutant:
    """A textual replacement that removes one mechanism, and the tests that have to notice."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    promise: int | None = None
    behaviour: str | None = None
    timeout_s: float = 300

    @property
    def row(self) -> str:
        """The row of docs/promises.md that it belongs to: a promise's number or a behaviour's name."""
        return self.behaviour if self.promise is None else str(self.promise)

    def applied(self, root: Path) -> str:
        """The text of the file with the mechanism removed."""
        path = root / self.file
        if not path.is_file():
            raise BadMutant(f"{self.name}: there is no file {self.file}")
        text = path.read_text()
        if (count := text.count(self.old)) != 1:
            raise BadMutant(f"{self.name}: its old text is found {count} times in {self.file}, not once")
        if self.new == self.old:
            raise BadMutant(f"{self.name}: old and new text are the same")
        return text.replace(self.old, self.new)


def load(path: Path = MUTANTS) -> list[Mutant]:
    """All mutants of the file, checked for shape; whether they still apply is checked by `applied`."""
    mutants: list[Mutant] = []
    for entry in tomllib.loads(path.read_text()).get("mutant", []):
        try:
            mutant = Mutant(**entry | {"tests": tuple(entry["tests"])})
        except (KeyError, TypeError) as error:
            raise BadMutant(f"{entry.get('name', 'a mutant without name')}: {error}") from error
        if not mutant.tests:
            raise BadMutant(f"{mutant.name}: names no test")
        if (mutant.promise is None) == (mutant.behaviour is None):
            raise BadMutant(f"{mutant.name}: needs a promise or a behaviour, one of them")
        if mutant.name in {other.name for other in mutants}:
            raise BadMutant(f"{mutant.name}: two mutants have this name")
        mutants.append(mutant)
    return mutants


def copy_tree(destination: Path) -> None:
    """Copies what git tracks and what is new; no environments, caches or results."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (destination / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, destination / name)


def environment(tree: Path) -> dict[str, str]:
    # The copy comes before an installed eventtrain, in subprocesses of tests as well. No bytecode is written:
    # two versions of a file within one second and of one length would share it.
    return os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}


def require_own_package(tree: Path) -> None:
    command = [sys.executable, "-c", "import eventtrain; print(next(iter(eventtrain.__path__)))"]
    done = subprocess.run(
        command, cwd=tree, env=environment(tree), check=True, capture_output=True, text=True
    )
    if not Path(done.stdout.strip()).resolve().is_relative_to(tree.resolve()):
        raise BadMutant(f"The copy would test {done.stdout.strip()} instead of itself.")


def verdict_of(tests: Iterable[str], tree: Path, timeout_s: float) -> tuple[str, str]:
    """Runs the tests in the tree: green, red, or why neither can be said; and what they printed."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    # A process group of its own, so that a hanging test's subprocesses end with it.
    process = subprocess.Popen(
        command,
        cwd=tree,
        env=environment(tree),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        return RED, f"{output}\nno end after {timeout_s} s"
    if process.returncode == 0:
        # Skipped tests are no proof in either direction.
        return (GREEN if re.search(r"\d+ passed", output) else "nothing ran"), output
    if "ERROR collecting" in output or process.returncode in (2, 3, 4, 5):
        return "tests cannot run", output
    return RED, output


def judge(mutant: Mutant, tree: Path) -> tuple[str, str]:
    path = tree / mutant.file
    original = path.read_text()
    path.write_text(mutant.applied(tree))
    try:
        return verdict_of(mutant.tests, tree, mutant.timeout_s)
    finally:
        path.write_text(original)


def run(mutants: Sequence[Mutant]) -> bool:
    """Prints the table; true if every mutant was noticed."""
    for mutant in mutants:
        mutant.applied(ROOT)
    with tempfile.TemporaryDirectory(prefix="eventtrain-mutants-") as folder:
        tree = Path(folder)
        copy_tree(tree)
        require_own_package(tree)
        tests = list(dict.fromkeys(test for mutant in mutants for test in mutant.tests))
        limit = sum(mutant.timeout_s for mutant in mutants)
        verdict, output = verdict_of(tests, tree, limit)
        if verdict != GREEN:
            print(output)
            print(f"Unmutated, the tests are not green ({verdict}); that has to be put right first.")
            return False
        print(f"{len(tests)} tests are green unmutated.")
        width = max(len(mutant.name) for mutant in mutants)
        print(f"{'mutant':<{width}}  {'row':>7}  verdict    seconds  tests")
        survivors: list[str] = []
        for mutant in mutants:
            start = time.monotonic()
            verdict, output = judge(mutant, tree)
            duration_s = time.monotonic() - start
            word = {RED: "killed", GREEN: "SURVIVED"}.get(verdict, "UNCLEAR")
            row = f"{mutant.name:<{width}}  {mutant.row:>7}  {word:<9}  {duration_s:>7.1f}"
            print(f"{row}  {' '.join(mutant.tests)}", flush=True)
            if verdict == RED:
                continue
            survivors.append(mutant.name)
            if verdict != GREEN:
                print(f"    {verdict}:\n{output}")
    print(f"{len(mutants) - len(survivors)} of {len(mutants)} killed.")
    return not survivors


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Remove each promised mechanism; its tests have to fail.")
    parser.add_argument("--only", action="append", metavar="NAME", help="this mutant (may be repeated)")
    parser.add_argument("--list", action="store_true", help="list the mutants and end")
    options = parser.parse_args(arguments)
    try:
        mutants = load()
        names = {mutant.name for mutant in mutants}
        if unknown := sorted(set(options.only or ()) - names):
            raise BadMutant(f"No mutant is named {', '.join(unknown)}; --list shows the names.")
        mutants = [mutant for mutant in mutants if options.only is None or mutant.name in options.only]
        if options.list or not mutants:
            for mutant in mutants:
                print(f"{mutant.name}  {mutant.row}  {mutant.file}  {' '.join(mutant.tests)}")
            print(f"{len(mutants)} mutants")
            return 0
        return 0 if run(mutants) else 1
    except BadMutant as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
