"""Holds the floors of the design: imports go to floors below only, without cycles, none hidden.

`violations` reads every file's syntax tree, function bodies and importlib calls included; the tests below
plant one violation of each kind in a copy of the package and look for it in the report.
"""

from __future__ import annotations

import ast
import graphlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = "eventtrain"
ROOT = Path(__file__).resolve().parent.parent

# Longest match wins; a file that matches nothing is a violation, so a new one has to be given its floor here.
FLOORS = {
    "errors": "0 errors",
    "frozen": "1 vocabulary",
    "events": "1 vocabulary",
    "event_names": "1 vocabulary",
    "commands": "1 vocabulary",
    "cut_facts": "1 vocabulary",
    "bus": "2a bus",
    "device": "2b device",
    "loop": "3 loop",
    "control": "3 loop",
    "command_inbox": "3 loop",
    "kept_snapshot": "3 loop",
    "control_room": "3 loop",
    "keeping": "3 loop",
    "resuming": "3 loop",
    "resume_point": "3 loop",
    "saved_run": "3 loop",
    "stream": "3 loop",
    "gates": "3 loop",
    "windows": "3 loop",
    "loop_statistics": "3 loop",
    "tracing": "3 loop",
    "boundary": "3 loop",
    "backpressure": "3 loop",
    "before": "3 loop",
    "schedule": "3 loop",
    "effects": "3 loop",
    "evaluation": "3 loop",
    "data": "3 loop",
    "prefetch": "3 loop",
    "feed": "3 loop",
    "model": "3 loop",
    "participants": "3 loop",
    "whereabouts": "3 loop",
    "session": "3 loop",
    "signals": "3 loop",
    "subscriber": "3 loop",
    "progress": "3 loop",
    "progress_display": "3 loop",
    "progress_table": "3 loop",
    "fitting": "4 trainer",
    "activity": "4 trainer",
    "fit_result": "4 trainer",
    "inference": "4 trainer",
    "trainer": "4 trainer",
    "array_loader": "4 trainer",
    "testing": "4 trainer",
    "subscribers": "5 subscribers",
    "config": "5b configuration",
    "cli": "6 programs",
    "script": "6 programs",
    "demo": "6 programs",
    "digits": "6 programs",
    "checkpoint_commands": "6 programs",
    "service": "6 programs",
    "": "7 package",
}

# What each floor may import of eventtrain: floors, or single modules where a whole floor would be too much.
MAY_IMPORT = {
    "0 errors": set[str](),
    "1 vocabulary": {"0 errors", "1 vocabulary"},
    "2a bus": {"0 errors", "1 vocabulary", "2a bus"},
    "2b device": {"0 errors", "1 vocabulary", "2b device"},
    "3 loop": {"0 errors", "1 vocabulary", "2a bus", "2b device", "3 loop"},
    # These stand beside each other; only the facade may take others along.
    "4 trainer": {"0 errors", "1 vocabulary", "2a bus", "2b device", "3 loop"},
    "trainer": {"activity", "fit_result", "fitting", "inference"},
    # Subscribers see events and Control only; monitor and filenames are pure functions that several share, webhook a
    # part of one that knows nothing of runs. What a Checkpointer writes comes from the control room, as a saved run.
    "5 subscribers": {
        "0 errors",
        "1 vocabulary",
        "control",
        "kept_snapshot",
        "subscriber",
        "bus.options",
        "bus.queues",
        "subscribers.arguments",
        "subscribers.gpu_readings",
        "subscribers.host_readings",
        "subscribers.weighted_quantiles",
        "loop_statistics",
        "bus.subscription",
        "subscribers.metric_reader",
        "subscribers.monitor",
        "subscribers.rolling_quantile",
        "subscribers.saved_state",
        "subscribers.schedules",
        "subscribers.checked_schedule",
        "subscribers.schedule_follower",
        "subscribers.range_test",
        "subscribers.watching",
        "subscribers.filenames",
        "subscribers.whole_file",
        "subscribers.optional",
        "subscribers.columns",
        "subscribers.thinned",
        "subscribers.series",
        "subscribers.curves",
        "subscribers.column_names",
        "subscribers.csv_file",
        "subscribers.group_commit",
        "subscribers.parquet_parts",
        "subscribers.row_file",
        "subscribers.appended_file",
        "subscribers.own_thread",
        "subscribers.step_table",
        "subscribers.waiting_rows",
        "subscribers.environment",
        "subscribers.report_facts",
        "subscribers.report_content",
        "subscribers.report_html",
        "subscribers.report_markdown",
        "subscribers.webhook",
        "subscribers.alarm",
        "subscribers.alarms",
        "subscribers.alert_conditions",
        "subscribers.alert_attachments",
        "subscribers.alert_message",
        "subscribers.alert_metric_rules",
        "subscribers.alert_rule",
        "subscribers.alert_rules",
        "subscribers.alert_run_rules",
        "subscribers.clock_alarms",
        "subscribers.alert_sender",
        "subscribers.alert_target",
        "subscribers.alert_targets",
        "subscribers.alert_watch",
        "subscribers.apprise_target",
        "subscribers.dead_letters",
        "subscribers.public_address",
        "subscribers.quiet_libraries",
        "subscribers.quiet_orbax",
        "subscribers.theil_sen",
        "subscribers.transfers",
        "subscribers.local_file",
        "subscribers.object_store",
        "subscribers.uploads",
        "subscribers.upload_thread",
        "subscribers.job_thread",
        "subscribers.tracker_thread",
        "subscribers.hyperparam_curve",
        "subscribers.tracked_curves",
        "subscribers.step_rows",
        "subscribers.event_file",
        "subscribers.tensorboard_events",
        "subscribers.tracked_arrays",
        "subscribers.tracked_values",
        "subscribers.wandb_files",
        "subscribers.wandb_run",
        "subscribers.registry_thread",
        "subscribers.mlflow_access",
        "subscribers.mlflow_registry",
        "subscribers.mlflow_run",
        "subscribers.otel_recorder",
        "subscribers.prometheus_families",
        "subscribers.prometheus_http",
        "subscribers.prometheus_values",
        "saved_run",
        "control_room",
        "subscribers.disk",
        "subscribers.retention",
        "subscribers.best_so_far",
        "subscribers.checkpoint_folder",
        "subscribers.checkpoint_layout",
        "subscribers.checkpoint_names",
        "subscribers.checkpoint_reader",
        "subscribers.checkpoint_store",
        "subscribers.checkpoint_writer",
    },
    "subscribers": {"5 subscribers", "progress"},
    # What a file says is built by constructors alone; the names of types are those that the package of subscribers has.
    "5b configuration": {
        "0 errors",
        "1 vocabulary",
        "bus.bus",
        "bus.options",
        "subscriber",
        "subscribers",
        "5b configuration",
    },
    # Programs are written as a user's would be: from the package itself.
    "6 programs": {
        "0 errors",
        "1 vocabulary",
        "2a bus",
        "2b device",
        "3 loop",
        "4 trainer",
        "5 subscribers",
        "5b configuration",
        "6 programs",
        "7 package",
    },
    "7 package": {
        "0 errors",
        "1 vocabulary",
        "2a bus",
        "2b device",
        "3 loop",
        "4 trainer",
        "5 subscribers",
        "5b configuration",
    },
}

ARRAYS = {"jax", "jaxlib", "optax", "orbax", "flax", "equinox"}
EVENT_LOOPS = {"anyio", "asyncio", "trio", "uvloop", "sniffio"}
FORBIDDEN_PACKAGES = {
    # Below the bus as well: it may not get jax through what it imports.
    "0 errors": ARRAYS,
    "1 vocabulary": ARRAYS,
    "2a bus": ARRAYS,
    "2b device": EVENT_LOOPS,
}

# The modules whose __getattr__ loads files with optional dependencies when they are first asked for.
LAZY_MODULES = {"", "subscribers", "subscribers.optional"}


@dataclass(frozen=True)
class Import:
    """One import: of a module of eventtrain, named without the package's name, or of another package."""

    target: str
    line: int
    is_internal: bool
    for_typing: bool


def violations(root: Path) -> list[str]:
    """Every breach of the floors in `root`/eventtrain, one line each, with the file and the line."""
    folder = root / PACKAGE
    paths = {module_name(path.relative_to(folder)): path for path in sorted(folder.rglob("*.py"))}
    found: list[str] = []
    graph: dict[str, set[str]] = {}
    for module, path in paths.items():
        place = path.relative_to(root).as_posix()
        reader = ImportReader(module, path.name == "__init__.py", set(paths))
        reader.visit(ast.parse(path.read_text(), filename=place))
        found += [f"{place}:{line}: {what}" for line, what in reader.problems]
        if floor_of(module) is None:
            found.append(f"{place}: has no floor; add it to FLOORS in tests/test_layers.py")
            continue
        found += [
            f"{place}:{what.line}: {reason}" for what in reader.imports for reason in breaches(module, what)
        ]
        graph[module] = {
            what.target
            for what in reader.imports
            if what.is_internal and not what.for_typing and what.target != module
        }
    return found + cycles(graph)


def module_name(relative: Path) -> str:
    parts = relative.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def floor_of(module: str) -> str | None:
    if module == "":
        return FLOORS[""]
    return FLOORS.get(module) or FLOORS.get(module.split(".")[0])


def breaches(module: str, what: Import) -> Iterator[str]:
    floor = floor_of(module)
    assert floor is not None
    if not what.is_internal:
        package = what.target.split(".")[0]
        if package in FORBIDDEN_PACKAGES.get(floor, ()):
            yield f"floor {floor!r} may not import {package}"
        return
    if what.target == module:
        return
    allowed = MAY_IMPORT[floor] | MAY_IMPORT.get(module, set())
    if not allowed & {what.target, floor_of(what.target)}:
        target = what.target or PACKAGE
        yield f"floor {floor!r} may not import {target} (floor {floor_of(what.target)!r})"


def cycles(graph: dict[str, set[str]]) -> list[str]:
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        # The sorter walks from dependency to dependant; reversed, each name imports the next.
        return ["cycle: " + " -> ".join(name or PACKAGE for name in reversed(error.args[1]))]
    return []


class ImportReader(ast.NodeVisitor):
    """Collects the imports of one file, and the places where it hides one."""

    def __init__(self, module: str, is_package: bool, known: set[str]) -> None:
        self.imports: list[Import] = []
        self.problems: list[tuple[int, str]] = []
        self._module = module
        self._known = known
        self._importers = {"__import__", "import_module"}
        # What the dots of a relative import count from.
        self._package = [PACKAGE, *filter(None, module.split("."))]
        if not is_package:
            self._package.pop()
        self._functions: list[str] = []
        self._for_typing = False

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        for outside in (*node.decorator_list, *node.args.defaults, *filter(None, node.args.kw_defaults)):
            self.visit(outside)
        self._functions.append(node.name)
        for inside in node.body:
            self.visit(inside)
        self._functions.pop()

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self._functions.append("<lambda>")
        self.generic_visit(node)
        self._functions.pop()

    def visit_If(self, node: ast.If) -> None:
        name = node.test.attr if isinstance(node.test, ast.Attribute) else getattr(node.test, "id", None)
        before = self._for_typing
        self._for_typing = before or name == "TYPE_CHECKING"
        for statement in node.body:
            self.visit(statement)
        self._for_typing = before
        for outside in (node.test, *node.orelse):
            self.visit(outside)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._add(alias.name, node.lineno)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = self._absolute("." * node.level + (node.module or ""))
        for alias in node.names:
            if base == "importlib" and alias.name == "import_module":
                self._importers.add(alias.asname or alias.name)
            submodule = f"{base}.{alias.name}"
            self._add(submodule if self._internal(submodule) in self._known else base, node.lineno)

    def visit_Call(self, node: ast.Call) -> None:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
        if name in self._importers:
            argument = node.args[0] if node.args else None
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                self._add(self._absolute(argument.value), node.lineno)
            elif not self._in_lazy_getattr():
                self.problems.append(
                    (node.lineno, f"{name} of a name that is computed: floors cannot be checked")
                )
        self.generic_visit(node)

    def _add(self, name: str, line: int) -> None:
        if self._functions and not self._in_lazy_getattr():
            self.problems.append((line, f"import of {name} is hidden in {self._functions[-1]}"))
        internal = self._internal(name)
        target = name if internal is None else internal
        self.imports.append(Import(target, line, internal is not None, self._for_typing))

    def _in_lazy_getattr(self) -> bool:
        return self._module in LAZY_MODULES and self._functions[:1] == ["__getattr__"]

    def _internal(self, name: str) -> str | None:
        package, _, module = name.partition(".")
        return module if package == PACKAGE else None

    def _absolute(self, name: str) -> str:
        level = len(name) - len(name.lstrip("."))
        if level == 0:
            return name
        base = self._package[: len(self._package) - level + 1]
        return ".".join([*base, *filter(None, [name[level:]])])


def test_every_file_keeps_to_its_floor() -> None:
    assert violations(ROOT) == []


Plant = Callable[[dict[str, str]], list[str]]


@pytest.fixture
def plant(tmp_path: Path) -> Plant:
    """Appends source text to files in a copy of the package and returns the violations this adds."""
    shutil.copytree(ROOT / PACKAGE, tmp_path / PACKAGE, ignore=shutil.ignore_patterns("__pycache__"))

    def plant(sources: dict[str, str]) -> list[str]:
        before = violations(tmp_path)
        for file, source in sources.items():
            path = tmp_path / PACKAGE / file
            path.parent.mkdir(exist_ok=True)
            path.write_text((path.read_text() if path.exists() else "") + "\n" + source + "\n")
        return [line for line in violations(tmp_path) if line not in before]

    return plant


@pytest.mark.parametrize(
    ("file", "source", "expected"),
    [
        ("errors.py", "import eventtrain.events", "floor '0 errors' may not import events"),
        ("events.py", "import jax", "floor '1 vocabulary' may not import jax"),
        ("events.py", "from eventtrain.bus import queues", "floor '1 vocabulary' may not import bus"),
        ("bus/planted.py", "import jax.numpy as jnp", "floor '2a bus' may not import jax"),
        ("bus/planted.py", "from orbax import checkpoint", "floor '2a bus' may not import orbax"),
        ("bus/planted.py", "from eventtrain.device import planted", "floor '2a bus' may not import device"),
        ("bus/planted.py", "from eventtrain.loop import anything", "floor '2a bus' may not import loop"),
        ("bus/planted.py", "from .. import loop", "floor '2a bus' may not import"),
        ("device/planted.py", "import anyio", "floor '2b device' may not import anyio"),
        ("device/planted.py", "import asyncio.events", "floor '2b device' may not import asyncio"),
        ("device/planted.py", "from ..bus import queues", "floor '2b device' may not import bus"),
        ("loop.py", "from eventtrain import trainer", "floor '3 loop' may not import"),
        ("control.py", "from eventtrain import Trainer", "floor '3 loop' may not import eventtrain"),
        ("data.py", "import eventtrain.trainer", "floor '3 loop' may not import trainer"),
        ("array_loader.py", "import eventtrain.trainer", "floor '4 trainer' may not import trainer"),
        ("subscribers/planted.py", "import eventtrain.loop", "floor '5 subscribers' may not import loop"),
        ("subscribers/planted.py", "import eventtrain.stream", "floor '5 subscribers' may not import stream"),
        ("subscribers/planted.py", "import eventtrain.device", "floor '5 subscribers' may not import device"),
        (
            "subscribers/planted.py",
            "import eventtrain.bus.bus",
            "floor '5 subscribers' may not import bus.bus",
        ),
        ("subscribers/planted.py", "import eventtrain.subscribers.other", "may not import subscribers.other"),
        ("trainer.py", "import eventtrain.subscribers.other", "floor '4 trainer' may not import subscribers"),
        ("trainer.py", "import eventtrain.demo", "floor '4 trainer' may not import demo"),
        ("newcomer.py", "", "has no floor"),
    ],
)
def test_import_of_a_floor_not_below_is_reported(plant: Plant, file: str, source: str, expected: str) -> None:
    found = plant({file: source})
    assert any(line.startswith(f"{PACKAGE}/{file}:") and expected in line for line in found), found


@pytest.mark.parametrize(
    "source",
    [
        "import importlib\nloaded = importlib.import_module('jax.numpy')",
        "from importlib import import_module as load\nloaded = load('jax.numpy')",
        "loaded = __import__('jax')",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from jax import Array",
        "class Inside:\n    import jax",
        "try:\n    import jax\nexcept ImportError:\n    pass",
    ],
)
def test_jax_in_the_bus_is_reported_however_it_is_imported(plant: Plant, source: str) -> None:
    found = plant({"bus/planted.py": source})
    assert any("floor '2a bus' may not import jax" in line for line in found), found


@pytest.mark.parametrize(
    "source",
    [
        "def f():\n    import json",
        "async def f():\n    from eventtrain import errors",
        "class C:\n    def f(self):\n        if self:\n            import json",
        "def f():\n    import importlib\n    return importlib.import_module('json')",
        "f = lambda: __import__('json')",
        "def __getattr__(name):\n    import json",
    ],
)
def test_import_hidden_in_a_function_is_reported(plant: Plant, source: str) -> None:
    found = plant({"bus/planted.py": source})
    assert any("is hidden in" in line for line in found), found


def test_import_of_a_computed_name_is_reported(plant: Plant) -> None:
    found = plant({"bus/planted.py": "import importlib\nloaded = importlib.import_module('j' + 'ax')"})
    assert [line for line in found if "a name that is computed" in line], found


def test_cycle_is_reported_in_the_order_of_the_imports(plant: Plant) -> None:
    found = plant(
        {
            "bus/first.py": "import eventtrain.bus.second",
            "bus/second.py": "from eventtrain.bus import third",
            "bus/third.py": "from .first import anything",
        }
    )
    ring = ["bus.first", "bus.second", "bus.third"] * 2
    expected = ["cycle: " + " -> ".join(ring[start : start + 4]) for start in range(3)]
    assert len(found) == 1
    assert found[0] in expected


def test_imports_for_typing_make_no_cycle(plant: Plant) -> None:
    found = plant(
        {
            "bus/first.py": "import eventtrain.bus.second",
            "bus/second.py": "import typing\nif typing.TYPE_CHECKING:\n    from eventtrain.bus import first",
        }
    )
    assert found == []


def test_what_the_design_allows_is_not_reported(plant: Plant) -> None:
    lazy = (
        "import importlib\ndef __getattr__(name):\n    return importlib.import_module(f'.{name}', __name__)"
    )
    found = plant(
        {
            "bus/planted.py": "import anyio\nfrom eventtrain import errors\nfrom eventtrain.events import E",
            "device/planted.py": "import jax\nimport eventtrain.commands\nfrom .other import anything",
            "device/other.py": "import optax",
            "subscribers/planted.py": (
                "from eventtrain.control import Control\nfrom eventtrain.bus.queues import KeepLatest\n"
                "from eventtrain.subscribers.monitor import better\nfrom ..subscriber import Subscriber\n"
                "import httpx"
            ),
            "subscribers/monitor.py": "import math",
            "subscribers/__init__.py": lazy,
            "errors.py": "",
            "demo.py": "import eventtrain as et\nfrom eventtrain import subscribers as subs",
        }
    )
    assert found == []
