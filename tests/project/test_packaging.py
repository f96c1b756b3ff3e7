"""The package: version, metadata, typing marker, lower bounds, and nothing that belongs to one machine."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import eventtrain

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "eventtrain"
COMBINED = {"all", "demo", "service", "sinks"}
FOR_DEVELOPMENT = {"bench", "dev", "docs", "test"}


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def tracked_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_the_version_is_written_in_one_place(project: dict[str, Any]) -> None:
    assert "version" in project["dynamic"]
    assert re.fullmatch(r"\d+\.\d+\.\d+\w*", eventtrain.__version__)
    sources = [path for path in sorted(PACKAGE.rglob("*.py")) if eventtrain.__version__ in path.read_text()]
    assert sources == [PACKAGE / "_version.py"]


def test_the_package_works_from_a_source_tree_that_is_not_installed() -> None:
    code = """
import importlib.metadata as metadata
distribution = metadata.distribution
def without_eventtrain(name):
    if name == "eventtrain":
        raise metadata.PackageNotFoundError(name)
    return distribution(name)
metadata.distribution = without_eventtrain
import eventtrain
from eventtrain import cli, subscribers
for name in subscribers.__all__:
    getattr(subscribers, name)
from eventtrain.subscribers.reports.sections import _environment
assert dict(_environment())["eventtrain"] == eventtrain.__version__
print(eventtrain.__version__)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == eventtrain.__version__


def test_the_extra_all_has_every_optional_package_and_no_tool_for_development(
    project: dict[str, Any],
) -> None:
    extras = project["optional-dependencies"]

    def packages(extra: str) -> set[str]:
        found: set[str] = set()
        for line in extras[extra]:
            name, of_own = re.match(r"([\w-]+)(?:\[([\w,]+)\])?", line).groups()
            found |= {name} if name != "eventtrain" else set().union(*map(packages, of_own.split(",")))
        return found

    for_users = [extra for extra in extras if extra not in {"all", *FOR_DEVELOPMENT}]
    assert packages("all") == set().union(*map(packages, for_users))
    assert not packages("all") & {"pytest", "keras", "moto", "ruff", "pyright", "mkdocs-material", "pyee"}


@pytest.fixture
def hatch_build(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The build hook, without hatchling, which only builds need."""
    interface = ModuleType("hatchling.metadata.plugin.interface")
    interface.MetadataHookInterface = object  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, interface.__name__, interface)
    return load(ROOT / "hatch_build.py", "hatch_build")


def test_a_package_index_gets_a_readme_without_relative_links(hatch_build: ModuleType) -> None:
    readme = (ROOT / "README.md").read_text()
    assert hatch_build.RELATIVE_LINK.search(readme)
    without_address = hatch_build.with_absolute_links(readme, "")
    assert not hatch_build.RELATIVE_LINK.search(without_address)
    assert "Getting started (`docs/getting-started.md`)" in without_address
    linked = hatch_build.with_absolute_links(readme, "https://example.org/eventtrain")
    assert not hatch_build.RELATIVE_LINK.search(linked)
    assert "(https://example.org/eventtrain/blob/HEAD/docs/getting-started.md)" in linked


def test_a_package_index_gets_the_files_of_images_not_the_pages_that_show_them(
    hatch_build: ModuleType,
) -> None:
    page = "A table.\n\n![a chart](docs/images/chart.svg)\n"
    assert hatch_build.with_absolute_links(page, "") == "A table.\n\na chart (`docs/images/chart.svg`)\n"
    linked = hatch_build.with_absolute_links(page, "https://example.org/e")
    assert "![a chart](https://example.org/e/raw/HEAD/docs/images/chart.svg)" in linked


def test_the_urls_follow_from_the_address_in_pyproject(hatch_build: ModuleType) -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    hook = settings["tool"]["hatch"]["metadata"]["hooks"]["custom"]
    assert {"readme", "urls"} <= set(settings["project"]["dynamic"])
    assert (ROOT / hook["path"]).is_file()
    assert hatch_build.urls(hook["repository"]).get("Repository", "") == hook["repository"]
    assert (
        hatch_build.urls("https://example.org/e")["Changelog"]
        == "https://example.org/e/blob/HEAD/CHANGELOG.md"
    )


def load(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_package_is_marked_as_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()


def test_lowest_versions_tested_are_the_lowest_declared(project: dict[str, Any]) -> None:
    extras = project["optional-dependencies"]
    subscribers = [name for name in extras if name not in {*COMBINED, *FOR_DEVELOPMENT}]
    lines = [*project["dependencies"], *(line for name in subscribers for line in extras[name])]
    declared = dict(re.match(r"([\w-]+) >= ([\d.]+)", line).groups() for line in lines)
    pinned = dict(
        line.split("==")
        for line in (ROOT / "tests" / "lowest.txt").read_text().splitlines()
        if "==" in line and not line.startswith("#")
    )
    assert pinned == declared


def test_no_tracked_file_names_a_path_of_one_machine(tracked_files: list[Path]) -> None:
    # Home folders of any system, and this checkout wherever it is (unless that is as short as "/app").
    patterns = [r"(?<![\w.])/(?:home|Users)/\w+/", r"(?<![\w.])/(?:root)/", r"C:\\Users\\"]
    patterns += [re.escape(f"{path}/") for path in (ROOT, Path.home()) if len(path.parts) > 2]
    assert mentions("|".join(patterns), tracked_files) == []


def test_no_tracked_file_chooses_a_package_index(tracked_files: list[Path]) -> None:
    # Where packages come from is a setting of the person who installs.
    assert mentions(r"(?:extra-)?index-ur[l]|find-link[s]", tracked_files) == []


def mentions(pattern: str, paths: list[Path]) -> list[str]:
    own = Path(__file__).resolve()
    return [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:120]}"
        for path in paths
        if path != own and (text := text_of(path)) is not None
        for number, line in enumerate(text.splitlines(), start=1)
        if re.search(pattern, line)
    ]


def text_of(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None


def code_in_data(source: str) -> list[str]:
    """Returns each place where the source could run code found in data: pickle and similar, eval, exec."""
    unsafe_modules = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        modules: list[str] = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
        elif isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in {"eval", "exec"}:
                found.append(f"{node.lineno}: {node.func.id}")
            modules = [node.args[0].value] if node.args and is_string(node.args[0]) and imports(node) else []
            found += [
                f"{node.lineno}: allow_pickle"
                for keyword in node.keywords
                if keyword.arg == "allow_pickle" and getattr(keyword.value, "value", None) is not False
            ]
        found += [f"{node.lineno}: {name}" for name in modules if name.split(".")[0] in unsafe_modules]
    return found


def is_string(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def imports(call: ast.Call) -> bool:
    return getattr(call.func, "attr", getattr(call.func, "id", None)) in {"import_module", "__import__"}


def test_package_runs_no_code_from_data() -> None:
    found = {path.name: code_in_data(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}
    assert {name: places for name, places in found.items() if places} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import importlib\nimportlib.import_module('cloudpickle')",
        "__import__('marshal')",
        "eval('1')",
        "exec('x = 1')",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_code_in_data_is_found_where_it_is_planted(source: str) -> None:
    assert len(code_in_data(source)) == 1


def test_names_that_only_look_like_it_are_left_alone() -> None:
    assert code_in_data("eval_fn(x)\nstep.compile()\nmodel.eval()\nnp.load(path, allow_pickle=False)") == []


@pytest.fixture(scope="module")
def mutants() -> ModuleType:
    return load(ROOT / "tests" / "mutants" / "run.py", "eventtrain_mutants")


def test_every_mutant_still_applies(mutants: ModuleType) -> None:
    for mutant in mutants.load():
        assert mutant.applied(ROOT) != (ROOT / mutant.file).read_text()
        for test in mutant.tests:
            file, _, name = test.partition("::")
            assert name.split("::")[-1].split("[")[0] in (ROOT / file).read_text(), test


def test_mutant_whose_old_text_is_not_found_once_is_refused(mutants: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text("wait()\nwait()\n")
    for old, count in (("wait()", 2), ("gone()", 0)):
        mutant = mutants.Mutant(name="m", promise=1, file="code.py", old=old, new="", tests=("t",))
        with pytest.raises(mutants.BadMutant, match=f"found {count} times"):
            mutant.applied(tmp_path)
