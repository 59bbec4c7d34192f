# make demo: set-up and the whole pipeline on the built-in world.   make test: set-up and the tests.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1

# A file's tests share what is made for them, so they stay in one process.
PYTEST := $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile

.PHONY: demo test test-all lint mutate system clean

demo: $(VENV)/.installed
	$(BIN)/trueup demo

test: $(VENV)/.installed-dev
	$(PYTEST) -m "not long and not browser"

test-all: $(VENV)/.installed-dev
	$(PYTEST) -m "long or browser"

# Every small change of trueup.math, against its tests: for who changes it. A quarter of an hour on one core.
mutate: $(VENV)/.installed-dev
	$(BIN)/python scripts/mutate.py

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check src tests scripts benchmarks
	$(BIN)/ruff format --check src tests scripts benchmarks
	$(BIN)/mypy

# What the tests need from Debian: a browser, and PostgreSQL for the store.
system:
	apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium postgresql

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --quiet -c constraints.txt -e .[dev]
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
