# make setup | demo | test | test-full | gpu-test | bench | bench-build | docs | lint | clean
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
JOBS ?= 2
PRESET ?= mid
ROUNDS ?= 5
BACKEND ?= tensorrt-rtx
# Pins what is installed and, through the environment, what builds are made with.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: setup demo test test-full gpu-test bench bench-build docs lint clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit('svd-trt needs Python 3.11 or newer: make setup PYTHON=python3.12') if sys.version_info < (3, 11) else 0"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[export,rtx,bench,docs,dev]'
	touch $(READY)

demo: $(READY)
	$(BIN)/python examples/demo.py

test: lint
	$(BIN)/pytest -n $(JOBS) --dist loadgroup

# Full-size networks against torch: minutes, 16 GB of memory. Writes what it measured.
test-full: $(READY)
	$(BIN)/pytest -m slow tests/full --record benchmarks/results/full-size-parity.json

# The tests of the runtime on this machine's GPU, with engines of BACKEND (tensorrt-rtx or tensorrt). Writes what ran
# and what it measured.
gpu-test: $(READY)
	$(BIN)/python -m svd_trt.benchmarks.machine --need-gpu
	SVD_TRT_TEST_BACKEND=$(BACKEND) $(BIN)/pytest -m gpu tests/gpu \
		--record 'benchmarks/results/gpu-tests-{gpu}-$(BACKEND).json'

# Speed and fidelity beside diffusers on this machine: a quarter of an hour for PRESET=mid. Also draws it and puts the
# figures into docs/performance.md.
RESULT = benchmarks/results/bench-$(PRESET)-$(if $(wildcard /dev/nvidiactl),gpu,cpu).json
bench: $(READY)
	$(BIN)/svd-trt bench --preset $(PRESET) --rounds $(ROUNDS) -o $(RESULT)
	$(BIN)/svd-trt bench plot $(RESULT)
	$(BIN)/python -m svd_trt.benchmarks.report docs/performance.md benchmarks/results/bench-*.json

# What a full-size build costs: three builds, ten minutes, 20 GB of disk for a while.
bench-build: $(READY)
	$(BIN)/python -m svd_trt.benchmarks.full_size_builds cost -o benchmarks/results/build-cost.json

# The site of docs/ in site/. The build fails on any warning, and uses no network.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache

clean:
	rm -rf $(VENV) build dist demo site .mypy_cache .ruff_cache .pytest_cache
