# Two commands do everything on a fresh machine:  make reproduce  and  make test.
# Needs Python 3.11 or newer, make, and the package index. Variables, e.g. `make reproduce PYTHON=python3.12 LOCK=`:
#   PYTHON     the interpreter that makes the environment
#   VENV       where the environment lies
#   LOCK       file with the versions that the tests ran with; empty: the newest that settings.ini allows
#   PIP_FLAGS  more options for pip install, e.g. another index
#   WORKERS    processes that share the tests; the files of tests in order, each whole in one process
#   ARGS       more options for ela-repro reproduce, e.g. ARGS='--only skip_pattern'
PYTHON ?= python3
VENV ?= .venv
LOCK ?= requirements.lock
PIP_FLAGS ?=
WORKERS ?= 2
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CONSTRAINTS = $(if $(LOCK),-c $(LOCK))
SETTINGS := settings.ini setup.py $(LOCK)

.DEFAULT_GOAL := help
.PHONY: help install dev reproduce test unit coverage notebooks-test notebooks lock clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' Makefile

install: $(VENV)/.installed  ## Make the environment and install the package (done once)

dev: $(VENV)/.installed-dev  ## The same with what the tests and nbdev need

reproduce: $(VENV)/.installed  ## Train, run the notebooks and build the report of the quick profile
	$(BIN)/ela-repro reproduce --profile quick $(ARGS)

test: unit notebooks-test  ## Run all tests: package, notebooks, sync and cleanliness
	@echo "make test: all passed"

unit: $(VENV)/.installed-dev  ## Run pytest alone
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

coverage: $(VENV)/.installed-dev  ## Run pytest and show which lines it reaches; lines marked gpu are not counted
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest
	$(BIN)/coverage combine -q
	$(BIN)/coverage report --skip-covered --fail-under=90

notebooks-test: $(VENV)/.installed-dev  ## Run the notebooks' own tests alone; they train nothing that is in a table
	ELA_TRAIN=0 ELA_RESULTS="$(abspath $(VENV))/notebooks-test" OMP_NUM_THREADS=1 PATH="$(abspath $(BIN)):$$PATH" $(BIN)/nbdev_test --do_print --n_workers $(WORKERS)

notebooks: $(VENV)/.installed-dev  ## Execute the library notebooks in place, so that the outputs they show are current
	OMP_NUM_THREADS=1 $(BIN)/python -m nbconvert --to notebook --execute --inplace --ExecutePreprocessor.timeout=600 nbs/0*.ipynb nbs/1*.ipynb nbs/index.ipynb
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/nbdev_clean

lock: $(VENV)/.installed-dev  ## Write requirements.lock from the environment (make it with LOCK= first)
	@sed -n '/^#/p' requirements.lock > requirements.lock.new
	@$(PIP) freeze --exclude-editable | grep -vE '^(nvidia-|cuda-|triton)|@ ' >> requirements.lock.new
	@mv requirements.lock.new requirements.lock

clean:  ## Remove the environment and caches; results stay
	rm -rf $(VENV) .pytest_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.installed: $(SETTINGS)
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v >= (3, 11) else "error: %s is Python %d.%d, this project needs 3.11 or newer: make reproduce PYTHON=python3.12" % (sys.executable, *v))'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install $(PIP_FLAGS) -e . $(CONSTRAINTS) || { echo "error: the installation failed.$(if $(LOCK), If a version in $(LOCK) does not exist for this Python or platform: make reproduce LOCK=)"; exit 1; }
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install $(PIP_FLAGS) -e '.[dev]' $(CONSTRAINTS)
	@touch $@
