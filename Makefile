# The commands of the house; `make` alone lists them.
# Each installs what it needs into .venv first, which takes minutes once and nothing after that.

PYTHON ?= python3
CONFIG ?= configs/digits-revnet-2cpu.yaml
VENV := .venv
BIN := $(VENV)/bin
BENCH_VENV := .venv-bench
FAULTS_VENV := .venv-bench-faults
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test test-all check format bench bench-faults clean

help: ## List these commands
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 22

demo: $(VENV)/.demo ## Train a RevNet on two unequal CPU devices while another process takes memory from one
	$(BIN)/revdist launch $(CONFIG)

test: $(VENV)/.dev ## Run the tests that take minutes, not hours
	$(BIN)/python -m pytest -m "not slow and not cluster and not gpu"

test-all: $(VENV)/.dev ## Run every test this machine can run, the slow ones too
	$(BIN)/python -m pytest

check: $(VENV)/.dev ## Check style, formatting, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev ## Format the code and apply the fixes that are safe
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(BENCH_VENV)/.installed ## Compare with other reversible libraries, installed into .venv-bench
	$(BENCH_VENV)/bin/python benchmarks/reversible.py

bench-faults: $(FAULTS_VENV)/.installed ## Compare what faults cost with other launchers, in .venv-bench-faults
	$(FAULTS_VENV)/bin/python benchmarks/faults.py

clean: ## Remove the environments and every cache; runs/ stays
	rm -rf $(VENV) $(BENCH_VENV) $(FAULTS_VENV) dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find revdist tests benchmarks -name __pycache__ -type d -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "revdist needs Python 3.11 or newer, $(PYTHON) is older: make PYTHON=python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

# A stamp per set of packages: pip runs again only when what it would install has changed.
$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing revdist and its dependencies into $(VENV) ..."
	$(INSTALL) -e '.[data]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing revdist and its development tools into $(VENV) ..."
	$(INSTALL) -e '.[dev,data]'
	@touch $@ $(VENV)/.demo

# What revdist is compared with never meets its own environment.
$(BENCH_VENV)/.installed: pyproject.toml constraints.txt benchmarks/peers/requirements.txt
	@echo "Installing revdist and the libraries it is compared with into $(BENCH_VENV) ..."
	$(PYTHON) -m venv $(BENCH_VENV)
	$(BENCH_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		-e . -r benchmarks/peers/requirements.txt
	@touch $@

$(FAULTS_VENV)/.installed: pyproject.toml constraints.txt benchmarks/recovery/requirements.txt
	@echo "Installing revdist and the launchers it is compared with into $(FAULTS_VENV) ..."
	$(PYTHON) -m venv $(FAULTS_VENV)
	$(FAULTS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		-e '.[data]' -r benchmarks/recovery/requirements.txt
	@touch $@
