# Everything lives in .venv; remove it to start afresh.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: help demo test test-gpu lint format clean

help:  ## show the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(READY)  ## convert the embedded teacher, finetune, evaluate, report (about 3 minutes on two cores)
	$(BIN)/t2r run demo

test: lint  ## ruff, mypy and pytest
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/pytest -q -n auto --maxprocesses 8 -m "not gpu"

test-gpu: $(READY)  ## the tests that need a CUDA device
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 8 -m gpu

lint: $(READY)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)  ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environment and every cache, not your runs
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "t2r needs Python 3.11 or newer; $(PYTHON) is older. Name another: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --upgrade pip
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --group dev --editable .
	touch $(READY)
