# A fresh machine needs python3 (3.10 or newer) and make. Everything is installed into .venv and only when pyproject.toml changed.
# Without a GPU, `PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make sample` saves a few GB of CUDA libraries.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CORE := $(VENV)/.installed-core
DEV := $(VENV)/.installed-dev
APP := $(VENV)/.installed-app
# Threads that spin while they wait make everything many times slower on a busy machine.
export OMP_WAIT_POLICY ?= PASSIVE

# Tests share the cores, a thread each.
TESTS = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help sample app test test-web chromium gpu-report check format

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | while IFS="$$(printf '\t')" read -r name text; do \
		printf '  make %-10s %s\n' "$$name" "$$text"; done

sample: $(CORE) ## turn a picture and drawn trajectories into a video; ARGS="--help" shows what else it takes
	$(BIN)/python sample.py $(ARGS)

app: $(APP) ## open the web page on this machine; ARGS="--port 8000" and the like
	$(BIN)/python -m imageconductor app $(ARGS)

test: $(DEV) ## run the tests; ARGS="-k config" chooses among them
	$(TESTS) $(ARGS)

test-web: $(DEV) chromium ## run the tests that open pages in a real browser; skipped, with the reason, where there is none
	$(TESTS) -m web $(ARGS)

gpu-report: $(CORE) ## measure speed and memory on a GPU, 8 minutes; ARGS="--minutes 4" and the like
	$(BIN)/python -m pip install --quiet pytest hypothesis || echo "The report goes without the tests." >&2
	$(BIN)/python benchmarks/gpu_report.py $(ARGS)

chromium: # for the tests of pages, if this machine has none and lets us install it; without it they are skipped
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || \
		{ [ "$$(id -u)" = 0 ] && export DEBIAN_FRONTEND=noninteractive && timeout 120 apt-get update -qq && \
		timeout 240 apt-get install -y -qq chromium; } || \
		echo "No chromium, so tests of pages are skipped: apt-get install chromium as root, or put another into PATH." >&2

check: $(DEV) chromium ## what CI runs: formatting, lint, types, all tests that need no GPU or downloaded weights
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(TESTS) -m "not gpu and not weights"

format: $(DEV) ## format the code and mend what ruff can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed; name one with make PYTHON=/path/to/python3." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
		{ rm -f $@; echo "Could not make $(VENV); on Debian and Ubuntu: apt install python3-venv." >&2; exit 1; }

$(CORE): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(APP): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[app]'
	@touch $(CORE) $@

$(DEV): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[app,curate,metrics,deepspeed,dev]'
	@touch $(CORE) $@
