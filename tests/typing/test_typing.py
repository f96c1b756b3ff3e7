"""Mistakes in a user's program are errors to a type checker, and only those.

Each program in this folder marks the lines that pyright has to report: ``# E rule: part of the message`` for an error,
``# T type`` for a ``reveal_type``. Every other line has to pass.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = sorted(path.name for path in Path(__file__).parent.glob("*_program.py"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("pyright") is None, reason="pyright is not installed (the dev extra has it)"
    ),
]


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[int, list[tuple[str, str]]]]:
    """Program -> line -> what pyright reports there: the rule ("T" for a revealed type) and the message."""
    folder = tmp_path_factory.mktemp("program")
    settings = {
        "extraPaths": [str(ROOT)],
        "typeCheckingMode": "standard",
        "reportUnnecessaryComparison": "error",
    }
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    for name in PROGRAMS:
        shutil.copy(Path(__file__).parent / name, folder)
    arguments = ["--outputjson", "--project", str(folder), "--pythonpath", sys.executable]
    process = subprocess.run(
        [sys.executable, "-m", "pyright", *arguments], capture_output=True, text=True, check=False
    )
    found: dict[str, dict[int, list[tuple[str, str]]]] = {name: {} for name in PROGRAMS}
    for diagnostic in json.loads(process.stdout)["generalDiagnostics"]:
        name, line = Path(diagnostic["file"]).name, diagnostic["range"]["start"]["line"] + 1
        rule, message = diagnostic.get("rule", "T"), diagnostic["message"]
        if name in found:
            found[name].setdefault(line, []).append((rule, message.removeprefix("Type of ")))
    return found


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_planted_mistake_is_reported_and_nothing_else(
    program: str, reported: dict[str, dict[int, list[tuple[str, str]]]]
) -> None:
    lines = (Path(__file__).parent / program).read_text().splitlines()
    expected = {
        number: mark.groups()
        for number, line in enumerate(lines, 1)
        if (mark := re.search(r"# (E \w+|T) ?:? ?(.*)$", line)) is not None
    }
    assert len([rule for rule, _ in expected.values() if rule != "T"]) >= 9
    problems = [
        f"{program}:{line}: unexpected: {rule}: {message}"
        for line, diagnostics in reported[program].items()
        for rule, message in diagnostics
        if line not in expected
    ]
    for line, (rule, text) in expected.items():
        text = f'is "{text}"' if rule == "T" else text
        matching = [
            message
            for found, message in reported[program].get(line, [])
            if found == rule.removeprefix("E ") and text in message
        ]
        if not matching:
            problems.append(f"{program}:{line}: expected {rule}: {text}, got {reported[program].get(line)}")
    assert not problems, "\n".join(problems)
