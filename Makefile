# Everything runs in its own virtual environment, .venv; no activation needed.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# DeepSpeed compiles into this folder, if anything; one per environment.
export TORCH_EXTENSIONS_DIR := $(CURDIR)/$(VENV)/torch_extensions
export PATH := $(CURDIR)/$(BIN):$(PATH)
# Else DeepSpeed's launcher would choose Apple's GPU.
ifeq ($(shell uname),Darwin)
export DS_ACCELERATOR ?= cpu
endif

.PHONY: help setup demo check lint rules fast slow test all gpu docs clean

help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-8s %s\n", $$1, $$2}'

setup: $(STAMP)  ## the virtual environment with pinned packages (about 2 minutes, 6 GB)

$(STAMP): setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or later is needed; choose one with: make PYTHON=python3.11 setup"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
		{ echo "no virtual environments here; on Debian/Ubuntu: apt-get install python3-venv"; exit 1; }
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,docs,wandb,export,tokenizer]'
	@touch $@

demo: setup  ## pretrain on videos made on the spot, probe, draw: runs/demo/report.html
	deepspeed --quiet scripts/pretrain.py --deepspeed_config ds_configs/zero2.json
	python scripts/probe.py runs/demo
	python scripts/report.py runs/demo

# Processes of the tests share the cores: each computes on one, and waits without spinning.
check fast slow test all: export OMP_NUM_THREADS := 1
check fast slow test all: export OMP_WAIT_POLICY := PASSIVE
# Some containers set it, and then every process of the tests compiles the package anew.
unexport PYTHONDONTWRITEBYTECODE

check: setup  ## style, types, import rules and the fast tests (minutes)
	ruff format --check .
	ruff check .
	@$(MAKE) --no-print-directory --jobs 2 rules fast

lint: setup  ## style, types and import rules
	ruff format --check .
	ruff check .
	@$(MAKE) --no-print-directory rules

rules: setup  ## types and import rules
	mypy
	lint-imports

fast: setup  ## the fast tests
	pytest -q -n auto --dist worksteal -m "not slow and not dist and not gpu and not slurm and not fakecuda"

# More processes than cores, since many tests wait. The files of minutes start first.
BY_FILE := pytest -q -n 4 --dist loadfile --no-loadscope-reorder --durations=25

slow: setup  ## every other test that this machine can run
	$(BY_FILE) -m "slow or dist or gpu or slurm or fakecuda"

test: setup  ## style, types and every test that this machine can run
	ruff format --check .
	ruff check .
	@$(MAKE) --no-print-directory --jobs 2 rules all

all: setup  # in one session, so that the tests are collected once
	$(BY_FILE)

gpu:  ## what only a GPU can show, in ten minutes: runs/gpu (PYTHON=python3: without make setup)
ifeq ($(origin PYTHON),file)
	@$(MAKE) --no-print-directory setup
	python tests/gpu/check.py $(GPU)
else
	$(PYTHON) tests/gpu/check.py $(GPU)
endif

docs: export NO_MKDOCS_2_WARNING := 1
docs: setup  ## the documentation as a site: site/index.html
	mkdocs build --strict

clean:  ## remove the environment, the demo's data, the site and the runs
	rm -rf $(VENV) data/demo runs site *.egg-info .mypy_cache .ruff_cache .pytest_cache
