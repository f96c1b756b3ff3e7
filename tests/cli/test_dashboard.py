"""eventtrain dashboard: the page of runs from their logs, in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from eventtrain.cli import app
from tests.conftest import python_path
from tests.subscribers.dashboard.test_run_files import began, step, written

TOKEN = "a-token-for-tests-only"


@pytest.mark.slow
def test_it_prints_one_url_shows_the_run_and_ends_with_ctrl_c(tmp_path: Path) -> None:
    written(tmp_path / "my-run" / "events.jsonl", began(), *map(step, range(1, 101)))
    process = subprocess.Popen(
        [sys.executable, "-c", "from eventtrain.cli import app; app()", "dashboard", "--read-only", "my-run"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": python_path(), "EVENTTRAIN_DASHBOARD_TOKEN": TOKEN},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        url, _, token = line.removeprefix("Dashboard: ").strip().partition("#token=")
        assert token
        assert token != TOKEN  # this one permits watching only
        headers = {"Authorization": f"Bearer {token}"}
        with httpx.stream("GET", f"{url}api/stream", headers=headers, timeout=60, trust_env=False) as answer:
            frames = (json.loads(row[6:]) for row in answer.iter_lines() if row.startswith("data: "))
            assert next(frames)["control"] is False
            for frame in frames:
                (shown,) = frame["runs"].values()
                if shown.get("status", {}).get("step") == 100:
                    break
    finally:
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["missing"], {}, "missing"),
        (["run", "--host", "0.0.0.0"], {}, "other machines may reach this address"),
        (["run"], {"EVENTTRAIN_DASHBOARD_TOKEN": "short"}, "at least 16 characters"),
    ],
)
def test_what_cannot_be_served_is_an_error_with_exit_code_2(
    arguments: list[str],
    environment: dict[str, str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    written(Path("run/events.jsonl"), began())
    result = CliRunner().invoke(app, ["dashboard", *arguments], env=environment)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_a_port_in_use_is_an_error_by_name(tmp_path: Path) -> None:
    written(tmp_path / "events.jsonl", began())
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = CliRunner().invoke(app, ["dashboard", str(tmp_path), "--port", port])
    assert result.exit_code == 2
    assert f"port {port}" in result.stderr
