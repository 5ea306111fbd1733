# Every target installs what it needs into .venv, once. `make help` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml $(wildcard csrc/*.cpp csrc/*/*)

.PHONY: help demo test test-wheel bench lint gpu clean

help:
	@echo "make demo   train a small model with and without the method, write runs/demo/report.html (6 minutes)"
	@echo "make test   run the tests"
	@echo "make test-wheel TORCH=VERSION  run the operators' tests on the built wheel with another PyTorch"
	@echo "make bench  measure the operators against PyTorch, draw docs/benchmark.png, write README's table"
	@echo "make lint   ruff and mypy"
	@echo "make gpu    on a machine with an NVIDIA GPU: build, tests, compute-sanitizer, measurements. Ends after 9 minutes"
	@echo "            and goes on when called again. PYTHON=python3 takes that environment with its PyTorch;"
	@echo "            PARTS=\"build cuda\" runs these parts"
	@echo "make clean  remove what was built, and .venv"

# PyTorch and torchvision together, so that the two fit each other; a PyTorch that is there already stays.
$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch torchvision "setuptools>=77" wheel ninja
	@touch $@

# Without build isolation the extension is built against the PyTorch of this environment.
$(VENV)/extension: $(SOURCES) | $(VENV)/torch
	$(BIN)/pip install --quiet --no-build-isolation --editable .
	@touch $@

# What they need beside it; the extension stays as it is.
$(VENV)/demo $(VENV)/dev: $(VENV)/%: $(VENV)/extension
	env -u AML_KERNELS_CUDA AML_KERNELS_EXTENSION=0 $(BIN)/pip install --quiet --no-build-isolation --editable ".[$*]"
	@touch $@

demo: $(VENV)/demo
	$(BIN)/aml demo --out runs/demo

test: $(VENV)/dev
	$(BIN)/python -m pytest

# A wheel built for the PyTorch of .venv has to serve another version too: make test-wheel TORCH=2.13.0
ifeq ($(TORCH)$(filter test-wheel,$(MAKECMDGOALS)),test-wheel)
$(error TORCH: give the version of PyTorch to test with)
endif
test-wheel: $(VENV)/dev
	$(BIN)/python tests/wheel.py $(TORCH)

bench: $(VENV)/dev
	$(BIN)/python benchmarks/bench_fused.py --sweep --json benchmarks/results/cpu.json
	$(BIN)/python benchmarks/plot.py

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/mypy

# `make gpu PYTHON=...` uses that environment as it is, and installs nothing into it.
ifeq ($(origin PYTHON),command line)
gpu: GPU_PYTHON := $(PYTHON)
else
gpu: GPU_PYTHON := $(BIN)/python
gpu: $(VENV)/dev
endif
gpu:
	$(GPU_PYTHON) tests/gpu/run.py $(if $(PARTS),--only $(PARTS))

clean:
	rm -rf $(VENV) .cache build dist *.egg-info aml_kernels/*.so
