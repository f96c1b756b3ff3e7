"""Fills the generated parts of the pages: ``PYTHONPATH=. python docs/make_pages.py``.

A test fails if one of them is out of date.

docs/events.md          the events and their fields, from the classes and their docstrings
docs/promises.md        the mutants of each promise and behaviour, from tests/mutants/mutants.toml
docs/how-it-works.md    the packages, from tests/test_architecture.py and the first line of each package
docs/measuring.md       the tables and charts of measurements, from benchmarks/results
docs/api/index.md       the names of each page of the reference, in the order of mkdocs.yml
README.md               some figures of cost
"""

from __future__ import annotations

import ast
import inspect
import itertools
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import tables
from eventtrain import events

DOCS = Path(__file__).parent
ROOT = DOCS.parent

# --- events.md ---------------------------------------------------------------------------------------------

GROUPS = {
    "The run": ("RunStarted", "RunResumed", "RunCompleted", "RunFailed", "PeerLost"),
    "Epochs and steps": ("EpochStarted", "EpochCompleted", "StepStarted", "StepCompleted", "StepsCompleted"),
    "Evaluation, prediction, samples": (
        "EvalStarted",
        "EvalStepCompleted",
        "EvalCompleted",
        "PredictStarted",
        "PredictStepCompleted",
        "PredictCompleted",
        "SampleTaken",
    ),
    "Control": (
        "CommandApplied",
        "CommandRejected",
        "HyperparamChanged",
        "CommandConflict",
        "SnapshotTaken",
        "ActionRequested",
    ),
    "Checkpoints": (
        "CheckpointStarted",
        "CheckpointCommitted",
        "CheckpointFailed",
        "CheckpointSkipped",
        "StagingLimited",
        "CheckpointUploaded",
        "CheckpointUploadFailed",
        "CheckpointRestored",
    ),
    "Subscribers and alerts": (
        "SubscriberFailed",
        "SubscriberLagged",
        "SubscriberDisabled",
        "LoopStalled",
        "AlertRaised",
        "AlertResolved",
    ),
    "The machine": ("MachineMeasured", "ProfileCaptured"),
}
"""Heading -> names of the classes in its table."""


def events_page(page: str) -> str:
    """Returns the page with a table for each group of events."""
    listed = [name for group in GROUPS.values() for name in group]
    if sorted(listed) != sorted(kind.__name__ for kind in events.BUILT_IN):
        raise SystemExit("make_pages.py: GROUPS and events.BUILT_IN differ")
    parts: list[str] = []
    for heading, group in GROUPS.items():
        parts += [f"## {heading}", "", "| event | meaning | fields |", "|---|---|---|"]
        parts += [_row(getattr(events, name)) for name in group]
        parts.append("")
    return between("events", page, "\n".join(parts))


def _row(kind: type[events.Event]) -> str:
    own = [
        _field(name, field)
        for name, field in kind.model_fields.items()
        if name not in events.Event.model_fields
    ]
    mark = " ◆" if kind.lifecycle else ""
    return f"| `{kind.__name__}`{mark} | {_description(kind)} | {', '.join(own)} |"


def _field(name: str, field: Any) -> str:
    if field.is_required() or field.default_factory is not None or field.default is None:
        return f"`{name}`"
    return f"`{name}={field.default!r}`"


def _description(kind: type[events.Event]) -> str:
    """Returns the docstrings of the class and of its own fields."""
    texts = [inspect.getdoc(kind) or ""]
    body = ast.parse(inspect.getsource(kind)).body[0]
    assert isinstance(body, ast.ClassDef)
    for field, text in itertools.pairwise(body.body):
        match field, text:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(described))):
                texts.append(f"`{name}`: {described}")
            case _:
                pass
    return _plain(" ".join(texts))


# --- promises.md -------------------------------------------------------------------------------------------


def promises_page(page: str) -> str:
    """Returns the page with the mutants of each promise and behaviour in the last column."""
    mutants = tomllib.loads((ROOT / "tests" / "mutants" / "mutants.toml").read_text()).get("mutant", [])
    lines: list[str] = []
    for line in page.split("\n"):
        row = re.fullmatch(r"(\| (\d+|[a-z]+) \|.*\|)[^|]*\|", line)
        if row is not None:
            names = [f"`{mutant['name']}`" for mutant in mutants if _row_of(mutant) == row[2]]
            line = f"{row[1]} {' '.join(names)} |".replace("|  |", "| |")
        lines.append(line)
    text = "\n".join(lines)
    missing = [mutant["name"] for mutant in mutants if f"`{mutant['name']}`" not in text]
    if missing:
        raise SystemExit(f"make_pages.py: docs/promises.md has no row for {missing}")
    return text


def _row_of(mutant: dict[str, Any]) -> str:
    return mutant.get("behaviour") or str(mutant["promise"])


# --- how-it-works.md ---------------------------------------------------------------------------------------


def packages_page(page: str) -> str:
    """Returns the page with a line for each package, the highest floor first."""
    rows = ["| package | contents | imports |", "|---|---|---|"]
    for name, imports in reversed(_may_import().items()):
        path = ROOT / "eventtrain" / name
        module = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        summary = (ast.get_docstring(ast.parse(module.read_text())) or "").split("\n\n")[0]
        shown = f"`{name}/`" if path.is_dir() else f"`{name}.py`"
        rows.append(f"| {shown} | {_plain(summary)} | {imports.replace('__init__', 'the public names')} |")
    return between("packages", page, "\n".join(rows))


def _may_import() -> dict[str, str]:
    tree = ast.parse((ROOT / "tests" / "test_architecture.py").read_text())
    for node in tree.body:
        match node:
            case ast.Assign(targets=[ast.Name(id="MAY_IMPORT")], value=value):
                return ast.literal_eval(value)
            case _:
                pass
    raise SystemExit("make_pages.py: tests/test_architecture.py has no MAY_IMPORT")


# --- api/index.md ------------------------------------------------------------------------------------------


def reference_page(page: str) -> str:
    """Returns the page with a line for each topic, and a link to each name on it."""
    rows = ["| topic | names |", "|---|---|"]
    for name in re.findall(r" api/([\w-]+)\.md$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE):
        if name != "index":
            text = (DOCS / "api" / f"{name}.md").read_text()
            title = re.search(r"^# (.+)$", text, re.MULTILINE)
            assert title is not None
            links = [_reference(path) for path in re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE)]
            rows.append(f"| [{title[1]}]({name}.md) | {', '.join(links)} |")
    return between("reference", page, "\n".join(rows))


def _reference(path: str) -> str:
    if path == "eventtrain.errors":
        return "[every error](errors.md)"
    short = path.replace("eventtrain.subscribers.", "subs.").replace("eventtrain.testing.", "testing.")
    return f"[`{short.replace('eventtrain.', 'et.')}`][{path}]"


# --- README.md, measuring.md -------------------------------------------------------------------------------


def measuring_page(page: str) -> str:
    """Returns the page with every table and chart of every device that was measured."""
    return between("results", page, tables.of_every_device(images="images"))


COSTS = {
    ("loop", "8 subscribers", "1 ms"): "a 1 ms step with eight subscribers",
    ("peers", "eventtrain fit, JSON Lines", "0.2 ms"): "a 0.2 ms step, and a row in a file for each",
    (
        "peers",
        "Keras 3 fit on JAX, a callback per batch",
        "0.2 ms",
    ): "such a row in Keras 3 on JAX, by a callback",
    (
        "peers",
        "float(loss) in the loop, JSON Lines",
        "0.2 ms",
    ): "such a row by hand, with `float(loss)` in the loop",
    ("checkpoints", "Checkpointer: all steps", "1 GB"): "checkpoints of a state of 1 GB",
    (
        "checkpoints",
        "Orbax, asynchronous: all steps",
        "1 GB",
    ): "such checkpoints by Orbax alone, asynchronous: the arrays only",
    ("checkpoints", "Orbax, synchronous: all steps", "1 GB"): "such checkpoints by Orbax alone, synchronous",
}
"""Figures that the README shows, by part, case and size."""


def readme_page(page: str) -> str:
    """Returns the page with some figures of cost beside those of others, and a chart."""
    reports: list[str] = []
    for document in tables.documents():
        found = {(one["part"], one["case"], one["at"]): one["ratio"] for one in document["figures"]}
        rows = [f"| {text} | {found[key]:.2f} |" for key, text in COSTS.items() if found.get(key) is not None]
        chart = f"![Loops that write a row per step](docs/images/{document['slug']}-peers.svg)"
        reports += [
            "\n".join(["| | time / bare loop |", "|---|---|", *rows]),
            chart,
            tables.machine(document),
        ]
    return between("costs", page, "\n\n".join(reports))


# --- all of them -------------------------------------------------------------------------------------------


def between(marker: str, page: str, text: str) -> str:
    """Returns the page with ``text`` between the two comments of that name."""
    begin, end = f"<!-- {marker}:begin -->", f"<!-- {marker}:end -->"
    before, rest = page.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}\n\n{text.strip()}\n\n{end}{after}"


def _plain(docstring: str) -> str:
    """Returns a docstring as one line of a table."""
    return re.sub(r"``(.+?)``", r"`\1`", " ".join(docstring.split())).replace("|", "\\|")


PAGES: dict[Path, Callable[[str], str]] = {
    DOCS / "events.md": events_page,
    DOCS / "promises.md": promises_page,
    DOCS / "how-it-works.md": packages_page,
    DOCS / "measuring.md": measuring_page,
    DOCS / "api" / "index.md": reference_page,
    ROOT / "README.md": readme_page,
}

if __name__ == "__main__":
    for path, fill in PAGES.items():
        path.write_text(fill(path.read_text()))
