# Every target makes .venv when it is missing or older than the list of dependencies, so each works on a fresh clone.

PYTHON ?= $(shell python3.11 -c '' 2>/dev/null && echo python3.11 || echo python3)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# Many container images set it. Every process would then compile all that it imports again: 4 seconds of each `dar`.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install demo test lint docs format clean ci-tools

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(INSTALLED) ## make .venv with the pinned versions of constraints.txt

demo: $(INSTALLED) ## a small D-AR model draws fruit: pictures and metrics in runs/quickstart
	$(BIN)/dar quickstart

test: $(INSTALLED) ## run every test, the slow ones too; ARGS="-k name" narrows it
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal $(ARGS)

lint: $(INSTALLED) ## check style and formatting, change nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

docs: $(INSTALLED) ## build the site into docs/_build; a broken link or reference is an error
	PYTHONPATH=. $(BIN)/python -m sphinx --quiet --nitpicky --fail-on-warning --keep-going docs docs/_build

format: $(INSTALLED) ## mend style and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

ci-tools: ## install SLURM and Chromium by apt-get, for the tests that are skipped without them
	@.ci/tools

clean: ## remove .venv and caches; runs/ stays
	rm -rf $(VENV) build dist docs/_build docs/api .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp comes last: an install that was cut short is done again.
$(INSTALLED): pyproject.toml constraints.txt overrides.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("dar_lightning needs Python 3.11 or newer, $(PYTHON) is %d.%d; try: make PYTHON=/path/to/python3.11" % v[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt uv
	$(BIN)/uv pip install --python $(BIN)/python --constraint constraints.txt --override overrides.txt --editable '.[demo,dev,docs,hub,notebooks]'
	@touch $@
