# Two commands for a newcomer: `make demo` and `make test`. Both set up .venv first (Python >= 3.11 and git are enough).
# Any torch >= 2.11 works; to choose a build: make demo PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
PIP_FLAGS ?=
JOBS ?= 2
BIN := .venv/bin

.PHONY: help setup demo test check format families conformance clean

help: ## Show the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: .venv/.ready ## Create .venv with everything pinned in constraints.txt

.venv/.ready: pyproject.toml constraints.txt
	@echo "Setting up .venv (once; PyTorch is large) ..."
	@$(PYTHON) -c 'import sys; sys.exit("moetrace needs Python >= 3.11, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt $(PIP_FLAGS) -e '.[dev]'
	@touch $@

demo: setup ## Serve the tiny model, roll out, train without and with replay
	@$(BIN)/python examples/demo.py

test: setup ## Run the tests, JOBS files at a time
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

check: setup ## Lint, format and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: setup ## Format the code
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

families: setup ## Write docs/families.md: what works with every MoE family of transformers
	@$(BIN)/python scripts/families.py

conformance: setup ## Write the tables of docs/conformance.md: broken engines, and what catches them
	@$(BIN)/python scripts/conformance.py

clean: ## Remove .venv and caches
	@rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis
