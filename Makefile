# make setup | demo | test | test-fast | test-all | test-full | test-lowest | test-faults | test-fuzz | test-browser | test-ray |
#      gpu-test | gpu-probe | gpu-pack | bench | bench-quality | bench-build | bench-kernels | bench-serve | cpp |
#      cpp-tidy | docs | lint | clean
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
JOBS ?= 2
PRESET ?= mid
ROUNDS ?= 5
BACKEND ?= tensorrt-rtx
# The versions of all packages, and of the tools that pip builds packages with.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: setup demo test test-fast test-all test-full test-lowest test-faults test-fuzz test-browser test-ray gpu-test gpu-probe gpu-pack bench \
	bench-quality bench-build bench-kernels bench-serve cpp cpp-tidy docs lint clean

# Python compiles what is imported, which is a third of what pip would compile.
setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit('svd-trt needs Python 3.11 or newer: make setup PYTHON=python3.12') if sys.version_info < (3, 11) else 0"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile --editable '.[export,rtx,bench,heic,profile,serve,docs,dev]'
	touch $(READY)

demo: $(READY)
	$(BIN)/python examples/demo.py

# Each finished test process takes waiting tests from the others, so that they end at the same time.
PYTEST := $(BIN)/pytest -n $(JOBS) --dist worksteal
# Lint runs beside the tests, whose processes wait for one another now and then.
WITH_LINT = @$(MAKE) --no-print-directory lint & lint=$$!; $(1); tests=$$?; \
	wait $$lint || { echo 'make lint failed, see above'; exit 1; }; exit $$tests

# Builds the networks and engines that the tests use, or takes them from the cache of an earlier run.
test: $(READY)
	$(call WITH_LINT,$(PYTEST))

# Leaves out the tests that export networks or build engines.
test-fast: $(READY)
	$(call WITH_LINT,$(PYTEST) -m 'not bundles and not slow and not faults and not fuzz')

# Also runs what is slow, with full-size networks: needs 16 GB of memory.
test-all: test test-full test-faults test-fuzz test-browser test-ray
	$(PYTEST) -m 'slow and not browser' --ignore tests/full --ignore tests/serve/test_ray.py

# Runs the runtime with the lowest versions of its dependencies, in an environment that is kept for the next run.
test-lowest: $(READY)
	$(BIN)/pytest -m 'slow or not slow' tests/lowest

# Compares full-size networks with torch: takes minutes and 16 GB of memory. Writes the figures.
test-full: $(READY)
	$(BIN)/pytest -m slow tests/full --record benchmarks/results/full-size-parity.json

# Kills, starves and interrupts commands, and fills their disks: takes a quarter of an hour. Writes what it did.
# SVD_TRT_TEST_SEED=N repeats a run. Disks are mounted, in a namespace of its own if this user may not do so.
test-faults: $(READY)
	$(if $(filter 0,$(shell id -u)),,unshare --map-root-user --mount) \
		$(BIN)/pytest -m faults tests/faults --record benchmarks/results/faults.json

# Tries ten thousand damaged inputs. Writes their numbers. SVD_TRT_TEST_SEED=N repeats a run.
test-fuzz: $(READY)
	$(BIN)/pytest -m fuzz tests/fuzz --record benchmarks/results/fuzz.json

# Serves with Ray, in an environment of 0.7 GB that is kept for the next run: takes ten minutes. Writes the figures.
test-ray: $(READY)
	$(BIN)/pytest -m slow tests/serve/test_ray.py --record benchmarks/results/serve-ray.json

# Uses the page of svd-trt serve in Debian's Chromium, which it installs if this user may.
test-browser: $(READY)
	@command -v chromium >/dev/null || { test $$(id -u) = 0 && apt-get update -qq && \
		apt-get install -qq --no-install-recommends chromium >/dev/null; } || { echo 'apt-get install chromium'; exit 1; }
	$(BIN)/pytest -m browser tests/browser

# Runs the tests of the runtime on this machine's GPU, with engines of BACKEND (tensorrt-rtx or tensorrt). Writes the
# tests that passed and their figures.
gpu-test: $(READY)
	$(BIN)/python -m svd_trt.benchmarks.machine --need-gpu
	SVD_TRT_TEST_BACKEND=$(BACKEND) $(BIN)/pytest -m gpu tests/gpu \
		--record 'benchmarks/results/gpu-tests-{gpu}-$(BACKEND).json'

# Asks this machine's GPU what no other machine can answer, the most valuable first, and records every answer. Takes up
# to an hour; PROBE='--limit 590 --missing' goes on where it stopped, PROBE=--list shows the steps.
PROBE ?=
gpu-probe: $(READY)
	$(BIN)/python -m svd_trt.benchmarks.gpu_probe --backend $(BACKEND) $(PROBE)

# Packs the packages that the probe needs into PACK, for a GPU machine that has torch and no package index; with
# BACKEND=onnxruntime-gpu those for its steps `provider`, which Hopper GPUs run, and not TensorRT for RTX. GPU=sm90 keeps
# the code of one GPU.
PACK ?= gpu-pack
gpu-pack: $(READY)
	$(BIN)/python -m svd_trt.benchmarks.gpu_pack $(PACK) $(if $(filter onnxruntime-gpu,$(BACKEND)),--backend $(BACKEND)) $(if $(GPU),--gpu $(GPU))

# Compares speed and fidelity with diffusers on this machine: takes a quarter of an hour for PRESET=mid. Draws the
# charts and writes the figures into docs/performance.md.
RESULT = benchmarks/results/bench-$(PRESET)-$(if $(wildcard /dev/nvidiactl),gpu,cpu).json
bench: $(READY)
	$(BIN)/svd-trt bench --preset $(PRESET) --rounds $(ROUNDS) -o $(RESULT)
	$(BIN)/svd-trt bench plot $(RESULT)
	$(BIN)/python -m svd_trt.benchmarks.report docs/performance.md benchmarks/results/bench-*.json

# Measures on the miniature what fewer evaluations cost in quality, with CLIPS held-out clips: takes half a minute for each on
# two cores. Draws the chart and writes the figures into docs/quality.md.
QUALITY := benchmarks/results/quality-tiny
CLIPS ?= 8
bench-quality: $(READY)
	mkdir -p build/quality
	$(BIN)/svd-trt build examples/tiny/checkpoint -o build/quality/tiny --height 32 --width 32 --frames 2:8:8 \
		--precision fp32 --backend onnxruntime --shallow-steps
	$(BIN)/python examples/tiny/clips.py --clips $(CLIPS) -o build/quality/clips.npz
	$(BIN)/svd-trt bench quality build/quality/tiny --clips build/quality/clips.npz --pictures $(CLIPS) \
		-o $(QUALITY).json --plot $(QUALITY).png
	$(BIN)/python -m svd_trt.benchmarks.quality_report docs/quality.md $(QUALITY).json

# Measures full-size builds: makes three, in ten minutes, and needs 20 GB of disk while it runs.
bench-build: $(READY)
	$(BIN)/python -m svd_trt.benchmarks.full_size_builds cost -o benchmarks/results/build-cost.json

# Lists the kernels of full-size engines: makes eight measurements in half an hour, with 8 GB of memory, and writes
# the tables of docs/kernels.md. `VARIANTS="--variant default"` measures some again and keeps the others.
KERNELS := benchmarks/results/kernels-full-size.json
bench-kernels: $(READY)
	$(BIN)/python -m svd_trt.benchmarks.full_size_kernels measure -o $(KERNELS) $(VARIANTS)
	$(BIN)/python -m svd_trt.benchmarks.full_size_kernels page docs/kernels.md $(KERNELS)

# What serving costs beside the pipeline, on the miniature: takes minutes, on a machine that does nothing else.
SERVE := benchmarks/results/serve-load
bench-serve: $(READY)
	mkdir -p build
	$(BIN)/svd-trt build examples/tiny/checkpoint -o build/serve-miniature --height 32 --width 32 --frames 2:8:8 \
		--backend onnxruntime
	$(BIN)/python -m svd_trt.benchmarks.serve_load build/serve-miniature examples/tiny/picture.png -o $(SERVE).json

# Builds the C++ runtime, its examples and its tests in build/cpp/release. docs/embedding.md is for other machines.
# SANITIZE=address,undefined CPP_BUILD=asan builds it elsewhere with sanitizers.
CPP_BUILD ?= release
SANITIZE ?=
CPP_FOLDER := $(CURDIR)/build/cpp
cpp: $(READY)
	@for tool in c++ cmake; do command -v $$tool >/dev/null || { echo 'apt-get install g++ cmake'; exit 1; }; done
	runtime/cpp/dependencies.sh $(CPP_FOLDER)/dependencies $(BIN)/python
	cmake -S runtime/cpp -B $(CPP_FOLDER)/$(CPP_BUILD) -DCMAKE_PREFIX_PATH=$(CPP_FOLDER)/dependencies/usr \
		-DONNXRUNTIME_ROOT=$(CPP_FOLDER)/dependencies/onnxruntime -DSVD_TRT_SANITIZE=$(SANITIZE) \
		-DSVD_TRT_WARNINGS_AS_ERRORS=$(if $(SANITIZE),OFF,ON) -DSVD_TRT_TESTS=ON
	cmake --build $(CPP_FOLDER)/$(CPP_BUILD) --parallel $(JOBS)

# Checks the C++ runtime with clang-tidy: takes minutes.
cpp-tidy: cpp
	$(BIN)/clang-tidy --quiet -p $(CPP_FOLDER)/release runtime/cpp/src/*.cpp runtime/cpp/examples/cli*.cpp

# Builds the site of docs/ in site/. Fails on warnings, and needs no network.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

CPP_SOURCES = $(wildcard runtime/cpp/*/*.h runtime/cpp/*/*.hpp runtime/cpp/*/*.c runtime/cpp/*/*.cpp)
lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache
	$(BIN)/clang-format --dry-run --Werror $(CPP_SOURCES)

clean:
	rm -rf $(VENV) build dist demo site .mypy_cache .ruff_cache .pytest_cache
