# Requires Python, make and a package index. `make demo` shows the library, `make test` tests it.
PYTHON ?= python3
VENV ?= .venv
VENV_LOWEST ?= .venv-lowest
PYTEST_ARGS ?=
CAMPAIGN ?=
N ?=
QUICK ?=

BIN := $(VENV)/bin
# -qq hides the installer's warnings, but not its errors.
PIP_INSTALL := -m pip --disable-pip-version-check install -qq

.PHONY: help demo test test-lowest lint format types docs bench mutants faults faults-slice clean
.DELETE_ON_ERROR:
# Two installations at the same time would break the environment.
.NOTPARALLEL:

help:
	@echo "make demo         train a small network on real digits with every kind of subscriber"
	@echo "make test         run all tests, or some of them (PYTEST_ARGS='-k name')"
	@echo "make test-lowest  run the tests on the lowest supported versions (PYTHON=python3.11)"
	@echo "make lint types   check style (ruff) and types (pyright)"
	@echo "make format       format the code and apply ruff's fixes"
	@echo "make docs         build the documentation into site/"
	@echo "make bench        measure on this machine's device and fill the tables of the documentation (QUICK=1)"
	@echo "make faults       run or continue campaigns of random trials (CAMPAIGN=keras N=2000)"
	@echo "make faults-slice run a few new trials of each campaign, as in CI"
	@echo "make mutants      check that tests fail when a promised mechanism is removed"
	@echo "make clean        remove build output and caches, but not the environments"

demo: $(VENV)/.installed-demo
	$(BIN)/eventtrain demo

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-lowest: $(VENV_LOWEST)/.installed-lowest
	$(VENV_LOWEST)/bin/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.installed-dev
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright --pythonpath $(BIN)/python

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(VENV)/.installed-bench
	$(BIN)/python -m benchmarks $(if $(QUICK),--quick)
	PYTHONPATH=. $(BIN)/python docs/make_pages.py

mutants: $(VENV)/.installed-test
	$(BIN)/python tests/mutants/run.py

# All campaigns, or the one named by CAMPAIGN; N trials, or the number that the campaign defines.
faults: $(VENV)/.installed-test
	$(BIN)/python -m benchmarks.faults $(CAMPAIGN) $(if $(N),--trials $(N))

# A few new trials of each; their results are not written.
faults-slice: $(VENV)/.installed-test
	$(BIN)/python -m benchmarks.faults $(CAMPAIGN) --slice $(if $(N),--trials $(N))

# One stamp per extra, renewed only when pyproject.toml changes. bin/pip is the last file that venv writes, so an
# interrupted creation is repeated.
$(VENV)/.installed-%: pyproject.toml | $(BIN)/pip
	@echo "Installing eventtrain[$*] into $(VENV): about a minute, and nothing is printed ..."
	$(BIN)/python $(PIP_INSTALL) --editable ".[$*]"
	@touch $@

$(VENV_LOWEST)/.installed-lowest: pyproject.toml tests/lowest.txt | $(VENV_LOWEST)/bin/pip
	$(VENV_LOWEST)/bin/python $(PIP_INSTALL) --constraint tests/lowest.txt --editable ".[test]"
	@touch $@

$(BIN)/pip $(VENV_LOWEST)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "eventtrain requires Python 3.11 or later. Use make PYTHON=python3.11 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(patsubst %/bin/pip,%,$@)

clean:
	rm -rf build dist site .pytest_cache .ruff_cache .hypothesis htmlcov .coverage
	find . -path "./.venv*" -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
