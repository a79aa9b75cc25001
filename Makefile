# `make` alone prints what there is. PYTHON picks the interpreter of the virtual environment: make test PYTHON=python3.12
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
DEMO_METHODS ?= local,fedavg,ensemble,fusefl
DEMO_OUT ?= runs/demo
NUM_PROCESSES ?= 2

# One thread per process: two processes with default threads run several times slower than with one thread each.
export OMP_NUM_THREADS := 1
export HF_HUB_OFFLINE ?= 1
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1
export RAY_USAGE_STATS_ENABLED := 0
export NO_MKDOCS_2_WARNING := 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow lint types bench docs docs-serve format clean

help: ## show this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# Stamps: an environment is made once and installed into again only when what it is made from changes.
$(BIN)/python:
	@echo "making the virtual environment $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { echo "python3 -m venv failed. On Debian: apt-get install python3-venv"; rm -rf $(VENV); exit 1; }

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing fedfuse and what it needs into $(VENV) (about 90 s, once)"
	@$(PIP) -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "installing what development needs into $(VENV) (about a minute, once)"
	@$(PIP) -e ".[dev]"
	@touch $@

demo: $(VENV)/.installed ## compare four methods on handwritten digits and write a report
	@$(BIN)/fedfuse compare examples/digits.yaml --methods $(DEMO_METHODS) --out $(DEMO_OUT)
	@echo "The report: $(DEMO_OUT)/report.html"

test: $(VENV)/.installed-dev ## the fast tests and the doctests
	@$(BIN)/pytest -n $(NUM_PROCESSES) --dist loadgroup -q -m "not slow"

test-slow: $(VENV)/.installed-dev ## the tests that take longer
	@$(BIN)/pytest -n $(NUM_PROCESSES) --dist loadgroup -q -m slow --durations=10 || [ $$? -eq 5 ] # 5: there are none

lint: $(VENV)/.installed-dev ## style, docstrings, import law
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/flake8 src/fedfuse
	@$(BIN)/lint-imports

types: $(VENV)/.installed-dev ## mypy --strict
	@$(BIN)/mypy

format: $(VENV)/.installed-dev ## put the code into the common form
	@$(BIN)/ruff check --fix --quiet || true
	@$(BIN)/ruff format

bench: $(VENV)/.installed-dev ## run every benchmark, one after another
	@set -e; for file in benchmarks/*.py; do [ -e "$$file" ] || continue; echo "== $$file"; $(BIN)/python "$$file"; done

docs: $(VENV)/.installed-dev ## build the site into site/
	@$(BIN)/mkdocs build --strict --quiet
	@echo "The site: site/index.html"

docs-serve: $(VENV)/.installed-dev ## show the site while you write
	@$(BIN)/mkdocs serve

clean: ## remove what was built; keeps runs/ and the virtual environment
	@rm -rf build dist site .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage
	@find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
