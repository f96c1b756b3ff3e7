"""Phrases that make the project's English hard to read are not in its docstrings, comments, messages and pages."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "eventtrain"

PHRASES = {
    r"(?<!\bthere )\bis no\b(?! longer\b)": "is not a",
    r"(?<!-)\banew\b": "again, from scratch",
    r"\b(?:some|no)body\b": "the component's name",
    r"\bwhoever\b": "the component's name",
    r"\bthrough with\b": "finished with",
    r"(?:, |\()say\b|\bsay[,)]": "for example",
    r"\blies?\b": "is, are",
    r"\bstands? (?:in|there|beside|under|above|below)\b": "is, are",
    r"\bgo(?:es|ing)? on\b": "resume, continue",
    r"\bwhat is said\b": "name the text",
}
"""Pattern, in lower case -> what to write instead."""

OPENING = re.compile(r"(?:what|who|whoever|where)\b", re.IGNORECASE)
"""A docstring opens with a verb in the third person, or with a noun."""


class Text(NamedTuple):
    """One comment, string or paragraph: where it begins, and its words, separated by single spaces."""

    path: Path
    line: int
    words: str
    is_docstring: bool = False


def faults(texts: Iterable[Text]) -> list[str]:
    """Every phrase found, with its place and what to write instead."""
    found: list[str] = []
    for text in texts:
        place = f"{text.path.relative_to(ROOT)}:{text.line}"
        for pattern, instead in PHRASES.items():
            for match in re.finditer(pattern, text.words.lower()):
                around = text.words[max(0, match.start() - 30) : match.end() + 30]
                found.append(f"{place}: {match[0]!r} in {around!r}; write {instead}")
        if text.is_docstring and OPENING.match(text.words):
            found.append(f"{place}: docstring opens with {text.words.split()[0]!r}: {text.words[:60]!r}")
    return found


def texts_of(path: Path) -> Iterator[Text]:
    content = path.read_text(encoding="utf-8")
    return python_texts(path, content) if path.suffix == ".py" else paragraphs(path, content)


def paragraphs(path: Path, content: str) -> Iterator[Text]:
    """Paragraphs, list items and table rows, so that a phrase that is broken over two lines is found."""
    for match in re.finditer(r"(?m)^.*\S.*\n?(?:(?! *(?:[-*|]|\d+\.) ).*\S.*\n?)*", content):
        yield text(path, content.count("\n", 0, match.start()) + 1, match[0])


def python_texts(path: Path, source: str) -> Iterator[Text]:
    """String literals, docstrings among them, and comments. Literals written side by side are one text."""
    tree = ast.parse(source)
    docstrings = set(docstring_nodes(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield text(path, node.lineno, node.value, node in docstrings)
    comments: list[tuple[int, str]] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            if comments and token.start[0] != comments[-1][0] + 1:
                yield joined(path, comments)
                comments = []
            comments.append((token.start[0], token.string.lstrip("# ")))
    if comments:
        yield joined(path, comments)


def docstring_nodes(tree: ast.Module) -> Iterator[ast.Constant]:
    """Those of modules, classes and functions, and strings below an assignment, which describe an attribute."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if not isinstance(body, list):
            continue
        for before, statement in pairwise([None, *body]):
            describes = isinstance(before, ast.Assign | ast.AnnAssign)
            opens = before is None and isinstance(
                node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
            )
            match statement:
                case ast.Expr(value=ast.Constant(value=str()) as constant) if opens or describes:
                    yield constant
                case _:
                    pass


def joined(path: Path, comments: list[tuple[int, str]]) -> Text:
    return text(path, comments[0][0], " ".join(comment for _, comment in comments))


def text(path: Path, line: int, words: str, is_docstring: bool = False) -> Text:
    return Text(path, line, " ".join(words.split()), is_docstring)


def areas() -> dict[str, list[Path]]:
    """Name -> the files whose texts are read: one area a package, a group of subscribers, and each place with prose."""
    found = {"eventtrain/*.py": sorted(PACKAGE.glob("*.py"))}
    for folder in sorted(PACKAGE.iterdir()):
        if folder.name == "subscribers":
            found["eventtrain/subscribers/*.py"] = sorted(folder.glob("*.py"))
            found |= {name_of(group): sorted(group.rglob("*.py")) for group in sorted(folder.glob("*/"))}
        elif folder.is_dir():
            found[name_of(folder)] = sorted(folder.rglob("*.py"))
    for folder in ("docs", "examples", "benchmarks"):
        files = sorted((ROOT / folder).rglob("*"))
        found[folder] = [path for path in files if path.suffix in (".py", ".md", ".toml")]
    found["pages at the top"] = sorted(ROOT.glob("*.md"))
    found["build"] = [ROOT / name for name in ("Makefile", "pyproject.toml", "mkdocs.yml", ".ci/run")]
    return {name: files for name, files in found.items() if files}


def name_of(folder: Path) -> str:
    return folder.relative_to(ROOT).as_posix()


@pytest.mark.parametrize(("name", "files"), areas().items(), ids=areas())
def test_no_phrase_of_the_list_is_used(name: str, files: list[Path]) -> None:
    found = [fault for path in files for fault in faults(texts_of(path))]
    assert not found, f"{len(found)} in {name}:\n" + "\n".join(found)


def test_every_python_file_of_the_package_is_in_one_area() -> None:
    listed = [path for files in areas().values() for path in files if path.is_relative_to(PACKAGE)]
    assert sorted(listed) == sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize(
    "phrase",
    ["That is no number.", "It starts\nanew.", "Somebody waits", "nobody waits", "Whoever asks", "through with it",
     "a lower rate, say, or none", "a rate (say 0.1)", "many steps, say.", "It lies in run_dir", "they lie here",
     "it stands in a file", "It goes on", "the run\n    # going on", "what is said of it"],
)  # fmt: skip
def test_a_planted_phrase_is_found_in_every_kind_of_text(phrase: str) -> None:
    path = ROOT / "planted"
    for source in (f'"""Text.\n\n{phrase}\n"""', f"call(f'''{{x}} {phrase}''')", comment(phrase)):
        assert faults(python_texts(path.with_suffix(".py"), source)), source
    assert faults(paragraphs(path.with_suffix(".md"), f"# Title\n\nText. {phrase}\n"))


def comment(phrase: str) -> str:
    return "\n".join(f"# {line.lstrip(' #')}" for line in phrase.splitlines())


@pytest.mark.parametrize(
    "source",
    ['"""What it was."""', 'def f():\n    """Where it is."""', 'class A:\n    """Who waits."""',
     'class A:\n    x: int = 1\n    """What it counts."""', 'LIMIT = 3\n"""Whoever is above it waits."""'],
)  # fmt: skip
def test_a_docstring_that_opens_with_a_question_word_is_found(source: str) -> None:
    assert len(faults(python_texts(ROOT / "planted.py", source))) >= 1


@pytest.mark.parametrize(
    "source",
    ["'There is no checkpoint.'", "# It is no longer finite.", "'The message says where.'", "'relies on'",
     "title = 'What went wrong'", '"""Whatever it is."""', "# ergo on", "'the clock stands still'"],
)  # fmt: skip
def test_what_only_looks_alike_is_left_alone(source: str) -> None:
    assert faults(python_texts(ROOT / "planted.py", source)) == []
