"""What `eventtrain run` takes from a script, and how it tells what is missing."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType

import pytest

import eventtrain as et
from eventtrain.cli.script import imported, passed_through, prepare
from eventtrain.subscribers import EarlyStopping

TRAINER = """
import eventtrain as et
from tests.support.models import batches, new_state, step_fn

def trainer(subscribers=()):
    return et.Trainer(step_fn, new_state(), subscribers=subscribers)
"""


@pytest.fixture
def script(tmp_path: Path):
    """Writes a script, and gives the module that it is."""
    with ExitStack() as stack:

        def script(text: str, name: str = "train_it") -> ModuleType:
            path = tmp_path / f"{name}.py"
            path.write_text(TRAINER + textwrap.dedent(text))
            return stack.enter_context(imported(path))

        yield script


@pytest.mark.parametrize(
    ("text", "data", "eval_data"),
    [
        ("def make_trainer(): return trainer()\ndata = [1]", [1], None),
        ("def make_trainer(): return trainer()\ndata = [1]\neval_data = [2]", [1], [2]),
        (
            "def make_trainer(): return trainer()\ndef make_data(): return [1]\ndef make_eval_data(): return [2]",
            [1],
            [2],
        ),
        ("def make_trainer(): return trainer(), [1]", [1], None),
        ("def make_trainer(): return trainer(), [1], [2]\ndata = [3]\neval_data = [4]", [1], [2]),
        ("def make_trainer(): return trainer(), [1]\neval_data = [4]", [1], [4]),
        ("data = [1]\nmake_trainer = trainer", [1], None),
    ],
)
def test_data_come_from_the_script_or_with_the_trainer(script, text, data, eval_data) -> None:
    job = prepare(script(text), [])
    assert isinstance(job.trainer, et.Trainer)
    assert (job.data, job.eval_data) == (data, eval_data)


@pytest.mark.parametrize("parameter", ["", "subscribers", "subscribers=()", "seed=0, *, subscribers"])
def test_subscribers_are_handed_to_make_trainer_or_added_afterwards(script, parameter) -> None:
    given = [EarlyStopping(), EarlyStopping()]
    handed = "subscribers" if "subscribers" in parameter else ""
    job = prepare(script(f"def make_trainer({parameter}): return trainer({handed})\ndata = [1]"), given)
    assert list(job.trainer.subscribers) == given


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("data = [1]", "does not define make_trainer(). For example:\n\n    def make_trainer(subscribers):"),
        ("make_trainer = 3\ndata = [1]", "does not define make_trainer()."),
        ("def make_trainer(): return trainer()", "defines neither `data` nor make_data(). For example:"),
        ("def make_trainer(): return 3\ndata = [1]", "returned int. Expected a Trainer, (trainer, data) or"),
        ("def make_trainer(): return None\ndata = [1]", "returned NoneType. Expected a Trainer"),
        ("def make_trainer(): return [1], trainer()", "returned (list, Trainer). Expected a Trainer"),
        ("def make_trainer(): return trainer(), 1, 2, 3", "returned (Trainer, int, int, int). Expected"),
        ("def make_trainer(): return ()", "returned (). Expected"),
        (
            "def make_trainer(width, depth): return trainer()\ndata = [1]",
            "required parameters that eventtrain does not pass: width, depth.",
        ),
        (
            "def make_trainer(subscribers): return trainer()\ndata = [1]",
            "did not pass on EarlyStopping. Pass all",
        ),
    ],
)
def test_what_a_script_lacks_is_told_with_its_file(script, text, expected) -> None:
    module = script(text)
    with pytest.raises(et.ConfigurationError) as caught:
        prepare(module, [EarlyStopping()])
    assert "train_it.py" in str(caught.value)
    assert expected in str(caught.value)
    assert not passed_through(caught.value, Path(module.__file__ or ""))


def test_a_script_is_a_module_of_its_own_name_beside_its_neighbours_for_as_long_as_it_is_needed(
    tmp_path,
) -> None:
    (tmp_path / "neighbour_of_it.py").write_text("answer = 42\n")
    path = tmp_path / "train-it.py"
    path.write_text(
        "import neighbour_of_it\nanswer = neighbour_of_it.answer\nmain = __name__ == '__main__'\n"
    )
    before = list(sys.path)
    try:
        with imported(path) as module:
            assert (module.answer, module.main, module.__name__) == (42, False, "train-it")
            assert sys.path == [str(tmp_path), *before]
            assert sys.modules["train-it"] is module
        assert sys.path == before
        assert "train-it" not in sys.modules
    finally:
        sys.modules.pop("neighbour_of_it", None)


def test_an_import_that_fails_leaves_nothing_behind(tmp_path) -> None:
    path = tmp_path / "broken_it.py"
    path.write_text("import eventtrain as et\nraise et.ConfigurationError('mine')\n")
    before = list(sys.path)
    with pytest.raises(et.ConfigurationError, match="mine") as caught, imported(path):
        pass
    assert passed_through(caught.value, path)
    assert sys.path == before
    assert "broken_it" not in sys.modules


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("none.py", "is not a Python file"),
        ("run.toml", "is not a Python file"),
        ("queue.py", "a module named 'queue' is loaded"),
    ],
)
def test_a_script_that_cannot_be_imported_is_told_by_name(tmp_path, name, reason) -> None:
    if name != "none.py":
        (tmp_path / name).write_text("")
    with pytest.raises(et.ConfigurationError, match=f"{name}.*{reason}"), imported(tmp_path / name):
        pass


def test_worker_processes_find_the_functions_of_a_script(tmp_path) -> None:
    path = tmp_path / "with_workers.py"
    path.write_text(
        "import multiprocessing\n"
        "def square(x): return x * x\n"
        "def total():\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        return sum(pool.map(square, [1, 2, 3]))\n"
    )
    main = "import sys; from pathlib import Path; from eventtrain.cli.script import imported\n"
    main += (
        "if __name__ == '__main__':\n    with imported(Path(sys.argv[1])) as module: print(module.total())\n"
    )
    (tmp_path / "main.py").write_text(main)
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [sys.executable, str(tmp_path / "main.py"), str(path)],
        env={"PYTHONPATH": root, "JAX_PLATFORMS": "cpu", "PATH": ""}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "14\n"), done.stderr
