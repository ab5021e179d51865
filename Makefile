# make demo    stylise a photo that ships with the sources; the picture lies in demo-out/
# make test    every test that needs no GPU
# make support-table    runs the conformance matrix on the CPU and writes the README's table of it
# make performance-tables    writes the README's tables and benchmarks/GOALS.md of the results kept in benchmarks/
# make docs    the reference from the docstrings, in build/docs; looks for links that lead nowhere
# make lint    ruff, mypy and clang-format; `make format` rewrites what can be rewritten
# make cuda    the CUDA library with nvcc (no GPU needed), e.g. make cuda ARCHS="80;90a" WERROR=ON
# make sanitize    the CPU library with GCC's address and undefined-behaviour sanitizers, and the operators' tests on it
# make wheel   a wheel in dist/
# make clean   removes what the above made, the environment included
#
# Needed: Python >= 3.10 with venv, make, a C++20 compiler; everything else comes from PyPI into .venv. Each command
# works alone and does again only what changed.

PYTHON ?= python3
VENV ?= .venv
BUILD ?= build
DIST ?= dist
DEMO_OUT ?= demo-out
STYLE ?= mosaic
PHOTO ?= examples/photos/photo.jpg
ARCHS ?= 80;90a
WERROR ?= OFF
JOBS ?= 2

TORCH := torch==2.13.0
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := $(shell find ops csrc cmake include python -type f -not -path '*/__pycache__/*')
CPP_SOURCES := $(shell find ops csrc cmake include examples tests/cpp -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
export CMAKE_BUILD_PARALLEL_LEVEL ?= $(JOBS)
export SKBUILD_BUILD_DIR := $(BUILD)/{wheel_tag}

.PHONY: demo test support-table performance-tables docs lint format cuda sanitize wheel clean
.DELETE_ON_ERROR:

demo: $(VENV)/.package
	$(BIN)/styleforge stylize $(PHOTO) $(DEMO_OUT)/$(basename $(notdir $(PHOTO)))-$(STYLE).png --style $(STYLE) --force
	@echo "stylised $(PHOTO): $(abspath $(DEMO_OUT))/$(basename $(notdir $(PHOTO)))-$(STYLE).png"

# One thread a worker: the workers share the cores.
test: $(VENV)/.package $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not cuda" -n $(JOBS) $(PYTEST_ARGS)

# On a machine with a GPU: PYTEST_ARGS="-m cuda" adds the CUDA entries.
support-table: $(VENV)/.package $(VENV)/.test
	rm -rf $(BUILD)/conformance
	STYLEFORGE_CONFORMANCE=$(abspath $(BUILD))/conformance OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not cuda" \
	  -n $(JOBS) --deselect tests/test_conformance.py::test_the_table_in_the_readme_is_the_outcome $(PYTEST_ARGS) \
	  tests/test_conformance.py
	$(BIN)/python tests/_conformance.py $(BUILD)/conformance

# To measure: benchmarks/run.py.
performance-tables:
	$(PYTHON) benchmarks/tables.py

docs: $(VENV)/.package $(VENV)/.docs
	$(BIN)/python docs/reference.py $(BUILD)/docs

lint: $(VENV)/.package $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP_SOURCES)

format: $(VENV)/.lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_SOURCES)

cuda: $(VENV)/.build-tools
	$(BIN)/cmake -S . -B $(BUILD)/cuda -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	  -DPython_EXECUTABLE=$(abspath $(BIN))/python -DSTYLEFORGE_CUDA=ON "-DSTYLEFORGE_CUDA_ARCHS=$(ARCHS)" \
	  -DSTYLEFORGE_WERROR=$(WERROR)
	$(BIN)/cmake --build $(BUILD)/cuda
	@echo "built $(abspath $(BUILD))/cuda/libstyleforge_cuda.so"

# Python is not made with the sanitizer, so its runtime has to come first; what Python leaves behind is not looked at.
sanitize: $(VENV)/.package $(VENV)/.test
	$(BIN)/cmake -S . -B $(BUILD)/sanitize -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	  -DPython_EXECUTABLE=$(abspath $(BIN))/python -DSTYLEFORGE_CUDA=OFF -DCMAKE_CXX_FLAGS_RELEASE=-O1 \
	  -DSTYLEFORGE_SANITIZE=address,undefined
	$(BIN)/cmake --build $(BUILD)/sanitize
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 STYLEFORGE_LIBRARY_PATH=$(abspath $(BUILD))/sanitize OMP_NUM_THREADS=2 \
	  $(BIN)/python -m pytest -m "not cuda" $(PYTEST_ARGS) $(wildcard tests/test_fused_*.py)

wheel: $(VENV)/.build-tools
	$(PIP) wheel --no-build-isolation --no-deps -w $(DIST) .

clean:
	rm -rf $(VENV) $(BUILD) $(DIST) $(DEMO_OUT) .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Stamps. PyTorch comes first and alone, so that no later step chooses another one.
$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python >= 3.10 is needed"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet $(TORCH)
	@touch $@

$(VENV)/.build-tools: $(VENV)/.torch requirements/build.txt
	$(PIP) install --quiet -r requirements/build.txt
	@touch $@

$(VENV)/.test: $(VENV)/.torch requirements/test.txt
	$(PIP) install --quiet -r requirements/test.txt
	@touch $@

$(VENV)/.lint: $(VENV)/.torch requirements/lint.txt
	$(PIP) install --quiet -r requirements/lint.txt
	@touch $@

$(VENV)/.docs: $(VENV)/.torch requirements/docs.txt
	$(PIP) install --quiet -r requirements/docs.txt
	@touch $@

$(VENV)/.package: $(VENV)/.build-tools CMakeLists.txt pyproject.toml $(SOURCES)
	$(PIP) install --quiet --no-build-isolation ".[video]"
	@touch $@
