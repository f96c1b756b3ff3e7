"""A package that is missing, or lacks one of its own, is named with its extra and the cause."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

import eventtrain as et
from eventtrain.validation.optional_imports import import_optional, require_installed


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes an importable package of the given text."""

    def make(text: str) -> str:
        name = f"made_{len(list(tmp_path.iterdir()))}_{tmp_path.name[-8:]}".replace("-", "_")
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(text)
        importlib.invalidate_caches()
        return name

    monkeypatch.syspath_prepend(tmp_path)
    return make


def refusal(module: str) -> str:
    found = import_optional(module, extra="wandb", used_by="Thing")
    with pytest.raises(et.ConfigurationError) as raised:
        require_installed(found)
    assert raised.value.__cause__ is not None
    return str(raised.value)


def test_a_package_that_is_not_installed_is_named_with_its_extra() -> None:
    assert refusal("no_such_package.sub") == (
        "Thing requires no_such_package, which is not installed. Install it: pip install 'eventtrain[wandb]'."
    )


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("import no_such_dependency", "ModuleNotFoundError: No module named 'no_such_dependency'"),
        ("from json import no_such_name", "ImportError: cannot import name 'no_such_name'"),
        ("raise ImportError('libx.so: cannot open shared object file')", "ImportError: libx.so: cannot open"),
        ("raise ValueError('numpy.dtype size changed')", "ValueError: numpy.dtype size changed"),
        (
            "raise AttributeError('module x has no attribute y')",
            "AttributeError: module x has no attribute y",
        ),
    ],
)
def test_a_package_that_lacks_one_of_its_own_is_not_called_missing(
    package: Any, text: str, cause: str
) -> None:
    name = package(text)
    told = refusal(name)
    assert told.startswith(f"Thing requires {name}, which is installed but cannot be imported: {cause}")
    assert "pip install 'eventtrain[wandb]' --force-reinstall" in told


def test_what_can_be_imported_is_returned() -> None:
    found = import_optional("json.decoder", extra="x", used_by="y")
    require_installed(found)
    assert found is sys.modules["json.decoder"]
