"""Keeps the packages apart: which may import which, without a circle, at most eight floors deep.

``violations`` reads the syntax tree of every module. It counts imports for typing, imports inside functions, optional
imports, and the tables of lazily imported names. The rules name packages only: no single module may import anything
that its package may not.
"""

from __future__ import annotations

import ast
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest

PACKAGE = "eventtrain"
ROOT = Path(__file__).resolve().parent.parent

MAY_IMPORT = {
    "_version": "",
    "errors": "",
    "events": "errors",
    "validation": "errors",
    "notebook": "errors",
    "runs": "errors validation events",
    "device": "errors validation",
    "bus": "errors validation events",
    "data": "errors validation device",
    "control": "errors validation notebook events device bus",
    "loop": "errors validation events device bus data control",
    "subscribers": "_version errors validation notebook events runs bus control",
    "trainer": "errors validation notebook events runs device bus data control loop subscribers",
    "config": "errors validation events bus subscribers",
    "testing": "errors validation events bus subscribers",
    "__init__": "_version errors events runs device bus data control subscribers trainer config",
    "cli": "errors validation events runs config subscribers __init__",
}
"""Package, or module at the top -> the packages that it may import besides itself; lowest floor first."""

SUBSCRIBERS_MAY_IMPORT = {
    "base": "",
    "_shared": "base",
    "policies": "base _shared",
    "checkpointing": "base _shared",
    "remote": "base _shared checkpointing",
    "loggers": "base _shared",
    "trackers": "base _shared",
    "alerts": "base _shared",
    "brokers": "base _shared",
    "dashboard": "base _shared",
    "reports": "base _shared",
    "monitoring": "base _shared",
    "progress": "base _shared",
    "__init__": "policies checkpointing remote loggers trackers alerts brokers dashboard reports monitoring progress",
}
"""The same for the groups of subscribers: they share ``base`` and ``_shared``, and do not know one another."""

MOST_FLOORS = 8
MOST_MODULES_AT_THE_TOP = 4

ARRAYS = {"jax", "jaxlib", "optax", "orbax", "flax", "equinox"}
EVENT_LOOPS = {"anyio", "asyncio", "trio", "uvloop", "sniffio"}
NEVER_IMPORTED_BY = {
    "errors": ARRAYS,
    "events": ARRAYS,
    "bus": ARRAYS,
    "runs": ARRAYS | EVENT_LOOPS,
    "device": EVENT_LOOPS,
}

OPTIONAL = "import_optional"
"""Imports what may not be installed; the only import that may be inside a function."""

Graph = dict[str, set[str]]


def violations(root: Path) -> list[str]:
    """Every breach of the rules in ``root``/eventtrain, one line each, with the module and the line."""
    folder = root / PACKAGE
    paths = {name_of(path.relative_to(root)): path for path in sorted(folder.rglob("*.py"))}
    found: list[str] = []
    graph: Graph = {module: set() for module in paths}
    for module, path in paths.items():
        imports = imports_of(module, path.name == "__init__.py", path.read_text())
        found += [f"{module}:{line}: {problem}" for line, problem in imports.problems]
        for target, line in imports.resolved(set(paths)):
            found += [f"{module}:{line}: {problem}" for problem in breaches(module, target, set(paths))]
            if target in paths and target != module:
                graph[module].add(target)
    return [*found, *shape(folder, graph)]


def name_of(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def breaches(module: str, target: str, modules: set[str]) -> Iterator[str]:
    """What is wrong with an import of ``target`` in ``module``; both are full dotted names."""
    room = room_of(module, PACKAGE)
    if target.split(".")[0] != PACKAGE:
        if target.split(".")[0] in NEVER_IMPORTED_BY.get(room, ()):
            yield f"{room} never imports {target.split('.')[0]}"
        return
    if target not in modules:
        return
    if module.startswith(f"{target}.") and (room, target) != ("cli", PACKAGE):
        yield f"imports the face of its own package, {target}"
    for package, rules in ((PACKAGE, MAY_IMPORT), (f"{PACKAGE}.subscribers", SUBSCRIBERS_MAY_IMPORT)):
        if not (is_in(module, package) and is_in(target, package)):
            continue
        importer, imported = room_of(module, package), room_of(target, package)
        if importer not in rules:
            yield f"{importer} is not in the rules for {package}"
        elif imported != importer and imported not in rules[importer].split():
            yield f"{importer} may not import {imported} ({target})"


def is_in(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def room_of(module: str, package: str) -> str:
    """The part of ``package`` that ``module`` is in; ``__init__`` for the package's own face."""
    return "__init__" if module == package else module.removeprefix(f"{package}.").split(".")[0]


def shape(folder: Path, graph: Graph) -> Iterator[str]:
    """Circles, and too many floors or modules."""
    for circle in circles(graph):
        yield f"circle: {' -> '.join(circle)}"
        return  # floors have no number then
    rooms: Graph = {}
    for module, targets in graph.items():
        room = room_of(module, PACKAGE)
        rooms.setdefault(room, set()).update({room_of(target, PACKAGE) for target in targets} - {room})
    for circle in circles(rooms):
        yield f"circle of packages: {' -> '.join(circle)}"
        return
    if (count := floors(rooms)) > MOST_FLOORS:
        yield f"{PACKAGE} has {count} floors"
    for room in rooms:
        inside = {module for module in graph if room_of(module, PACKAGE) == room}
        if (count := floors({module: graph[module] & inside for module in inside})) > MOST_FLOORS:
            yield f"{PACKAGE}.{room} has {count} floors"
    at_the_top = [path.name for path in folder.glob("*.py")]
    if len(at_the_top) > MOST_MODULES_AT_THE_TOP:
        yield f"{PACKAGE} has {len(at_the_top)} modules at the top: {', '.join(sorted(at_the_top))}"


def circles(graph: Graph) -> Iterator[list[str]]:
    """A circle of imports, in their order, if there is one."""
    finished: set[str] = set()

    def search(module: str, route: list[str]) -> list[str] | None:
        if module in route:
            return [*route[route.index(module) :], module]
        if module in finished:
            return None
        for target in sorted(graph.get(module, ())):
            if (circle := search(target, [*route, module])) is not None:
                return circle
        finished.add(module)
        return None

    for module in sorted(graph):
        if (circle := search(module, [])) is not None:
            yield circle
            return


def floors(graph: Graph) -> int:
    """How many modules the longest chain of imports has."""
    known: dict[str, int] = {}

    def floor(module: str) -> int:
        if module not in known:
            known[module] = 1 + max((floor(target) for target in graph.get(module, ())), default=0)
        return known[module]

    return max((floor(module) for module in graph), default=0)


@dataclass
class Imports:
    """What one module imports, wherever it does so, and the places where it hides what it imports."""

    names: list[tuple[str, str, int]] = field(default_factory=list)
    """Module, name in it (or ""), line."""
    problems: list[tuple[int, str]] = field(default_factory=list)

    def resolved(self, modules: set[str]) -> Iterator[tuple[str, int]]:
        """Each imported module with its line; ``from a import b`` imports ``a.b`` if that is a module."""
        for base, name, line in self.names:
            yield (f"{base}.{name}" if f"{base}.{name}" in modules else base), line


@cache
def imports_of(module: str, is_package: bool, text: str) -> Imports:
    reader = ImportReader(module, is_package)
    reader.visit(ast.parse(text))
    return reader.found


class ImportReader(ast.NodeVisitor):
    """Reads the ``Imports`` of one module."""

    def __init__(self, module: str, is_package: bool) -> None:
        self.found = Imports()
        self._base = module.split(".") if is_package else module.split(".")[:-1]
        self._functions: list[str] = []
        self._importers = {"__import__", "import_module", OPTIONAL}
        self._has_lazy_table = False

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        for outside in (*node.decorator_list, *node.args.defaults, *filter(None, node.args.kw_defaults)):
            self.visit(outside)
        self._functions.append(node.name)
        for inside in node.body:
            self.visit(inside)
        self._functions.pop()

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self._functions.append("a lambda")
        self.generic_visit(node)
        self._functions.pop()

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._add(alias.name, "", node.lineno)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = self._absolute(node.level, node.module or "")
        for alias in node.names:
            if base == "importlib" and alias.name == "import_module":
                self._importers.add(alias.asname or alias.name)
            self._add(base, alias.name, node.lineno)

    def visit_Assign(self, node: ast.Assign) -> None:
        """``_LAZY = {"Name": "eventtrain.package.module"}``: its values count as imports."""
        is_table = [ast.unparse(target) for target in node.targets] == ["_LAZY"]
        if is_table and not self._functions and isinstance(node.value, ast.Dict):
            self._has_lazy_table = True
            for value in node.value.values:
                self._add(ast.literal_eval(value), "", value.lineno)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
        if name in self._importers:
            argument = node.args[0] if node.args else None
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                level = len(argument.value) - len(argument.value.lstrip("."))
                module = self._absolute(level, argument.value[level:])
                self._add(module, "", node.lineno, may_be_inside=name == OPTIONAL)
            elif not self._is_checked_elsewhere():
                self.found.problems.append((node.lineno, f"{name} of a computed name hides what is imported"))
        self.generic_visit(node)

    def _is_checked_elsewhere(self) -> bool:
        """A computed name comes from the module's own table, or from the checked callers of ``import_optional``."""
        return self._functions == [OPTIONAL] or (self._has_lazy_table and self._functions == ["__getattr__"])

    def _add(self, module: str, name: str, line: int, *, may_be_inside: bool = False) -> None:
        if self._functions and not may_be_inside:
            self.found.problems.append((line, f"import of {module} is hidden in {self._functions[-1]}"))
        self.found.names.append((module, name, line))

    def _absolute(self, level: int, name: str) -> str:
        if level == 0:
            return name
        return ".".join([*self._base[: len(self._base) - level + 1], *filter(None, [name])])


def test_the_packages_keep_to_their_rules() -> None:
    assert violations(ROOT) == []


def test_every_package_and_every_group_of_subscribers_has_its_line() -> None:
    for folder, rules in (
        (ROOT / PACKAGE, MAY_IMPORT),
        (ROOT / PACKAGE / "subscribers", SUBSCRIBERS_MAY_IMPORT),
    ):
        entries = [
            path for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
        ]
        assert {path.stem for path in entries} == set(rules)


def test_every_test_is_in_the_folder_of_a_package() -> None:
    at_the_top = {path.name for path in (ROOT / "tests").glob("*.py")}
    assert at_the_top == {"__init__.py", "conftest.py", "test_architecture.py", "test_public.py"}
    packages = {path.name for path in (ROOT / PACKAGE).iterdir() if path.is_dir()}
    folders = {
        path.parent.relative_to(ROOT / "tests").parts[0] for path in (ROOT / "tests").glob("*/**/*.py")
    }
    assert folders <= packages | {"benchmarks", "mutants", "project", "support", "typing"}


Plant = Callable[[dict[str, str]], list[str]]


@pytest.fixture
def plant(tmp_path: Path) -> Plant:
    """Appends source text to modules in a copy of the package, and returns what this makes ``violations`` report."""
    shutil.copytree(ROOT / PACKAGE, tmp_path / PACKAGE, ignore=shutil.ignore_patterns("__pycache__"))

    def plant(sources: dict[str, str]) -> list[str]:
        for file, source in sources.items():
            path = tmp_path / PACKAGE / file
            path.parent.mkdir(exist_ok=True)
            with path.open("a") as module:
                module.write(f"\n{source}\n")
        return violations(tmp_path)

    return plant


def has(found: Iterable[str], *parts: str) -> bool:
    return any(all(part in line for part in parts) for line in found)


@pytest.mark.parametrize(
    ("file", "source", "expected"),
    [
        ("errors.py", "from eventtrain.events.base import Event", "errors may not import events"),
        ("events/new.py", "from eventtrain.bus import queues", "events may not import bus"),
        ("bus/new.py", "from eventtrain.device import state", "bus may not import device"),
        ("bus/new.py", "from ..loop import train_loop", "bus may not import loop"),
        ("device/new.py", "import eventtrain.bus.queues", "device may not import bus"),
        ("control/new.py", "from eventtrain.loop.boundary import Boundary", "control may not import loop"),
        ("loop/new.py", "from eventtrain.subscribers.base import Subscriber", "loop may not import subscribers"),
        ("loop/new.py", "from eventtrain import Trainer", "loop may not import __init__"),
        ("subscribers/loggers/new.py", "from eventtrain.loop import boundary", "subscribers may not import loop"),
        ("subscribers/loggers/new.py", "import eventtrain.subscribers.alerts.alerts", "loggers may not import alerts"),
        ("subscribers/_shared/new.py", "from ..policies import max_time", "_shared may not import policies"),
        ("trainer/new.py", "import eventtrain.config.load", "trainer may not import config"),
        ("new/inside.py", "import eventtrain.errors", "new is not in the rules"),
    ],
)  # fmt: skip
def test_an_import_that_the_rules_do_not_allow_is_reported(
    plant: Plant, file: str, source: str, expected: str
) -> None:
    assert has(plant({file: source}), name_of(Path(PACKAGE, file)), expected)


@pytest.mark.parametrize("room", ["errors.py", "events/new.py", "bus/new.py"])
@pytest.mark.parametrize(
    "source",
    [
        "import jax.numpy as jnp",
        "from orbax import checkpoint",
        "import importlib\nloaded = importlib.import_module('jax.numpy')",
        "from importlib import import_module as load\nloaded = load('jax.numpy')",
        "loaded = __import__('jax')",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from jax import Array",
        "class Inside:\n    import optax",
        "try:\n    import jax\nexcept ImportError:\n    pass",
        "def inside():\n    import jax",
    ],
)
def test_arrays_below_the_bus_are_reported_however_they_are_imported(
    plant: Plant, room: str, source: str
) -> None:
    assert has(plant({room: source}), "never imports")


@pytest.mark.parametrize("source", ["import anyio", "import asyncio.events", "from trio import lowlevel"])
def test_an_event_loop_in_device_is_reported(plant: Plant, source: str) -> None:
    assert has(plant({"device/new.py": source}), "device never imports")


@pytest.mark.parametrize(
    "source",
    [
        "def f():\n    import json",
        "async def f():\n    from eventtrain import errors",
        "class C:\n    def f(self):\n        if self:\n            import json",
        "f = lambda: __import__('json')",
        "def __getattr__(name):\n    import json",
    ],
)
def test_an_import_inside_a_function_is_reported(plant: Plant, source: str) -> None:
    assert has(plant({"bus/new.py": source}), "is hidden in")


@pytest.mark.parametrize(
    "source",
    [
        "loaded = importlib.import_module('j' + 'ax')",
        "def __getattr__(name):\n    return importlib.import_module(name)",
        "_LAZY = {}\ndef load(name):\n    return importlib.import_module(name)",
        "def f(name):\n    return import_optional(name, extra='x', used_by='y')",
    ],
)
def test_an_import_of_a_computed_name_is_reported(plant: Plant, source: str) -> None:
    assert has(plant({"bus/__init__.py": f"import importlib\n{source}"}), "computed name")


def test_optional_imports_and_tables_of_lazily_imported_names_count(plant: Plant) -> None:
    table = (
        "_LAZY = {'Net': 'eventtrain.bus.new'}\ndef __getattr__(name):\n    return import_module(_LAZY[name])"
    )
    assert plant({"bus/__init__.py": f"from importlib import import_module\n{table}", "bus/new.py": ""}) == []
    found = plant({"bus/new.py": "from eventtrain.bus import Net"})
    assert has(found, "circle", "eventtrain.bus -> eventtrain.bus.new -> eventtrain.bus")
    optional = "def f():\n    return import_optional('eventtrain.loop.boundary', extra='x', used_by='y')"
    assert has(plant({"bus/other.py": optional}), "bus may not import loop")


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("bus/new.py", "from eventtrain.bus import anything"),
        ("events/new.py", "from eventtrain.events import Event"),
        ("subscribers/loggers/new.py", "from eventtrain.subscribers import CSVLogger"),
        ("trainer/new.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import eventtrain"),
    ],
)
def test_an_import_of_the_face_of_its_own_package_is_reported(plant: Plant, file: str, source: str) -> None:
    assert has(plant({file: source}), "imports the face of its own package")


def test_a_circle_is_reported_in_the_order_of_its_imports(plant: Plant) -> None:
    found = plant(
        {
            "bus/first.py": "import eventtrain.bus.second",
            "bus/second.py": "from eventtrain.bus import third",
            "bus/third.py": "import typing\nif typing.TYPE_CHECKING:\n    from .first import anything",
        }
    )
    first, second, third = (f"{PACKAGE}.bus.{name}" for name in ("first", "second", "third"))
    assert found == [f"circle: {first} -> {second} -> {third} -> {first}"]


def test_a_ninth_floor_is_reported(plant: Plant) -> None:
    chain = {f"data/new_{n}.py": f"import {PACKAGE}.data.new_{n + 1}" for n in range(MOST_FLOORS)}
    assert has(plant({**chain, f"data/new_{MOST_FLOORS}.py": ""}), "data has 9 floors")


def test_a_ninth_floor_of_the_house_is_counted() -> None:
    rooms = {f"room_{n}": {f"room_{n + 1}"} for n in range(MOST_FLOORS)}
    assert floors(rooms) == MOST_FLOORS + 1


def test_a_fifth_module_at_the_top_is_reported(plant: Plant) -> None:
    assert has(plant({"new_1.py": "", "new_2.py": ""}), "modules at the top")
