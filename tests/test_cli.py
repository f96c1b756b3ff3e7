from __future__ import annotations

import json
import re
from importlib.metadata import version
from pathlib import Path

import pytest
from typer.testing import CliRunner

import eventtrain as et
from eventtrain import cli

runner = CliRunner()


def test_version_is_the_packages() -> None:
    result = runner.invoke(cli.app, ["--version"])
    assert result.exit_code == 0
    assert result.stdout == f"eventtrain {version('eventtrain')}\n"


def test_schema_is_that_of_all_events() -> None:
    result = runner.invoke(cli.app, ["schema"])
    assert result.exit_code == 0
    assert json.loads(result.stdout) == et.events_json_schema()


def test_help_names_the_commands() -> None:
    result = runner.invoke(cli.app, ["--help"], terminal_width=200)
    assert result.exit_code == 0
    assert {"demo", "schema"} <= set(re.findall(r"\w+", result.stdout))


def test_a_demo_that_shows_less_than_it_promises_exits_with_1(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given: list[Path | None] = []

    def failing(out: Path | None) -> str:
        given.append(out)
        return "no checkpoint was committed."

    monkeypatch.setattr(cli, "run_demo", failing)
    result = runner.invoke(cli.app, ["demo", "--out", str(tmp_path)])
    assert result.exit_code == 1
    assert result.stderr == "The demo failed: no checkpoint was committed.\n"
    assert given == [tmp_path]
