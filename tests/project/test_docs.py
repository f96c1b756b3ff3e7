"""The documentation holds: its Python runs, prints what it says, and what it lists exists."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import packages_distributions
from inspect import iscoroutinefunction
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

import anyio
import pytest
import typer

import eventtrain as et
import eventtrain.subscribers
import eventtrain.testing
from benchmarks.suite import PARTS
from eventtrain.cli.main import app

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md"))]

SLOW = [DOCS / "model-libraries.md", DOCS / "recipes.md"]  # they compile many networks
"""Pages whose Python takes more than about ten seconds."""

FENCE = re.compile(
    r"(?:^<!-- (?P<mark>not run: .+?|output) -->\n+)?"
    r"^(?P<indent> *)```(?P<language>\w+)[^\n]*\n(?P<text>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e[+-]?\d+)?(?![\w.])")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def load(path: Path) -> ModuleType:
    specification = importlib.util.spec_from_file_location(path.stem, path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@dataclass
class Block:
    """One fenced block of a page that is run, with what the page says it prints."""

    page: Path
    line: int
    source: str
    output: str | None = None


def blocks(page: Path) -> Iterator[Block]:
    """The Python blocks that are run, in order. ``<!-- output -->`` marks what the block before it prints."""
    text = page.read_text()
    found: list[Block] = []
    for match in FENCE.finditer(text):
        mark, language, body = match["mark"], match["language"], textwrap.dedent(match["text"])
        if language == "python" and mark is None:
            found.append(Block(page, text.count("\n", 0, match.start("text")), body))
        elif mark == "output":
            found[-1].output = body
    return iter(found)


def same(printed: str, said: str) -> bool:
    """Equal texts, but numbers may differ in their last digits, as they do between versions and processors."""
    numbers = [[float(number) for number in NUMBER.findall(text)] for text in (printed, said)]
    texts = [" ".join(NUMBER.sub("#", text).split()) for text in (printed, said)]
    return texts[0] == texts[1] and numbers[0] == pytest.approx(numbers[1], rel=1e-3, abs=1e-6)


def run(block: Block, names: dict[str, Any]) -> None:
    """Run a block, and then the tests it defines."""
    known = set(names)
    code = compile("\n" * block.line + block.source, str(block.page), "exec", dont_inherit=True)
    exec(code, names)
    for name in [name for name in names if name.startswith("test_") and name not in known]:
        test = names[name]
        anyio.run(partial(test)) if iscoroutinefunction(test) else test()


@pytest.mark.allow_blocking  # a relative run_dir, as a user writes it: Checkpointer asks for the working directory
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=name_of(page), marks=[pytest.mark.slow] if page in SLOW else [])
        for page in PAGES
        if list(blocks(page))
    ],
)
def test_the_python_of_a_page_runs_and_prints_what_the_page_says(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page):
        capsys.readouterr()
        run(block, names)
        printed = capsys.readouterr().out
        if block.output is not None:
            assert same(printed, block.output), f"{page.name}:{block.line} printed\n{printed}"


def test_a_block_that_is_not_run_says_why_and_there_are_few() -> None:
    fences = [match for page in PAGES for match in FENCE.finditer(page.read_text())]
    python = [match["mark"] for match in fences if match["language"] == "python"]
    skipped = [mark for mark in python if mark]
    assert len(skipped) <= 7
    assert len(python) - len(skipped) >= 20


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_name_of_the_library_in_a_page_exists(page: Path) -> None:
    owners = {
        "et": et,
        "subs": eventtrain.subscribers,
        "control": et.Control,
        "trainer": et.Trainer,
        "session": et.Session,
        "result": et.FitResult,
    }
    spans = re.findall(r"`([^`\n]+)`", FENCE.sub("", page.read_text()))
    mentioned = {match for span in spans for match in re.findall(r"(?<![\w./])(\w+)\.(\w+)", span)}
    of_objects = {("trainer", "bus"), *(("result", name) for name in et.FitResult.__dataclass_fields__)}
    assert [
        f"{owner}.{name}"
        for owner, name in sorted(mentioned - of_objects)
        if owner in owners and not hasattr(owners[owner], name)
    ] == []


def test_the_page_about_debugging_explains_every_error() -> None:
    section = (DOCS / "debugging.md").read_text().split("## What each error means")[1]
    described = re.findall(r"^\| `(\w+)` \| .+ \| .+ \|$", section, re.MULTILINE)
    errors = {getattr(et.errors, name).__name__ for name in et.errors.__all__}  # an alias is one error
    assert sorted(described) == sorted(errors)


@pytest.mark.parametrize("page", [page for page in PAGES if list(blocks(page))], ids=name_of)
def test_a_page_says_how_to_install_what_its_code_imports(page: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {name: names_of(needs) for name, needs in project["optional-dependencies"].items()}
    text = page.read_text()
    commands = "\n".join(re.findall(r"pip install ([^#\n]+)", text))
    told = {*re.findall(r"[\w-]+", commands), "eventtrain", *names_of(project["dependencies"])}
    told |= set().union(
        *(
            extras[name]
            for names in re.findall(r"eventtrain\[([\w,]+)\]", commands)
            for name in names.split(",")
        )
    )
    python = [
        textwrap.dedent(match["text"]) for match in FENCE.finditer(text) if match["language"] == "python"
    ]
    imported = {
        name for source in python for name in re.findall(r"^ *(?:from|import) (\w+)", source, re.MULTILINE)
    }
    distributions = packages_distributions()
    assert [
        name
        for name in sorted(imported - sys.stdlib_module_names)
        if not {each.lower().replace("_", "-") for each in distributions.get(name, [name])} & told
    ] == []


def names_of(requirements: list[str]) -> set[str]:
    return {match[0].lower() for each in requirements if (match := re.match(r"[\w-]+", each))}


def test_the_page_about_the_command_line_lists_every_command() -> None:
    table = (DOCS / "command-line.md").read_text().split("\n## ")[0]
    described = re.findall(
        r"`eventtrain (\w+)", "\n".join(re.findall(r"^\| (`[^|]+) \|", table, re.MULTILINE))
    )
    assert sorted(described) == sorted(typer.main.get_command(app).commands)  # pyright: ignore


def test_the_readme_shows_the_hello_world_that_lies_in_examples() -> None:
    sources = [block.source for block in blocks(ROOT / "README.md")]
    assert (ROOT / "examples" / "hello.py").read_text() in sources


@pytest.mark.allow_blocking  # a relative run_dir, as above
def test_the_first_training_of_the_readme_continues_when_it_is_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    block = next(blocks(ROOT / "README.md"))
    assert "epochs=20" in block.source
    run(replace(block, source=block.source.replace("epochs=20", "epochs=7")), {"__name__": "__main__"})
    names: dict[str, Any] = {"__name__": "__main__"}
    run(block, names)
    assert names["result"].epochs_completed == 13
    assert block.output is not None
    assert same(capsys.readouterr().out.splitlines()[-1], block.output)


def test_the_page_about_measuring_describes_every_part() -> None:
    described = re.findall(r"^\| `(\w+)` \|", (DOCS / "measuring.md").read_text(), re.MULTILINE)
    modules = [path.stem for path in (ROOT / "benchmarks" / "parts").glob("[!_]*.py")]
    assert sorted(described) == sorted(modules) == sorted(PARTS)


make_pages = load(DOCS / "make_pages.py")


@pytest.mark.parametrize("page", make_pages.PAGES, ids=name_of)
def test_the_generated_parts_of_a_page_are_up_to_date(page: Path) -> None:
    text = page.read_text()
    assert make_pages.PAGES[page](text) == text, "run PYTHONPATH=. python docs/make_pages.py"


REFERENCE = [
    path
    for page in sorted((DOCS / "api").glob("*.md"))
    for path in re.findall(r"^::: ([\w.]+)$", page.read_text(), re.MULTILINE)
]


def test_every_public_name_is_in_the_reference() -> None:
    listed = {*REFERENCE, *re.findall(r"^\| `(\w+)`", (DOCS / "events.md").read_text(), re.MULTILINE)}
    if "eventtrain.errors" in listed:  # shown with all its members
        listed |= {*et.errors.__all__}
    public = {
        f"{module.__name__}.{name}"
        for module in (et, eventtrain.subscribers, eventtrain.testing)
        for name in module.__all__
    }
    same = {"eventtrain.subscribers.restore_state": "eventtrain.load_state"}
    assert eventtrain.subscribers.restore_state is et.load_state
    assert [
        name
        for name in sorted(public)
        if same.get(name, name) not in listed and name.removeprefix("eventtrain.") not in listed
    ] == []


def test_the_reference_names_what_users_import() -> None:
    assert [path for path in REFERENCE if REFERENCE.count(path) > 1] == []
    modules = {module.__name__: module for module in (et, eventtrain.subscribers, eventtrain.testing)}
    for path in REFERENCE:
        module, _, name = path.rpartition(".")
        assert module in modules, f"{path} is not the path from which users import it"
        assert name in modules[module].__all__, path


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_relative_link_leads_to_a_file(page: Path) -> None:
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_every_page_is_in_the_navigation() -> None:
    configuration = (ROOT / "mkdocs.yml").read_text()
    pages = [page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")]
    assert [page for page in pages if f" {page}\n" not in configuration] == []


def test_the_site_loads_nothing_from_other_sites() -> None:
    assert "  font: false" in (ROOT / "mkdocs.yml").read_text()
    styles = [path.read_text() for path in DOCS.rglob("*.css")]
    images = [match for page in PAGES for match in re.findall(r"!\[[^]]*\]\(([^)]+)\)", page.read_text())]
    assert styles
    assert images
    assert [text for text in (*styles, *images) if re.search(r"(?:https?:)?//", text)] == []


@pytest.mark.slow
def test_each_promise_and_behaviour_names_tests_that_exist() -> None:
    page = (DOCS / "promises.md").read_text()
    rows = [line for line in page.splitlines() if re.match(r"\| (\d+|[a-z]+) \|", line)]
    named = [re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row) for row in rows]
    assert len(rows) >= 9
    assert all(named)
    missing = [f"{file}::{name}" for file, name in chain(*named) if name not in functions(ROOT / file)]
    assert missing == []


def functions(file: Path) -> set[str]:
    nodes = ast.walk(ast.parse(file.read_text()))
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
