# `make test` and `make demo` need Python 3.10+ and a C++ compiler; pip brings the rest into .venv.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
BIN := .venv/bin
# Also for build isolation, in old and new pip: a plain torch pulls several GB of CUDA packages.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_BUILD_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# What cmake and ninja are called by comes from .venv too.
export PATH := $(CURDIR)/$(BIN):$(PATH)

BUILT_FROM := setup.py pyproject.toml $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu*')
CXX_FILES := $(shell find csrc tests/csrc -regextype egrep -regex '.*\.(h|cc|cpp|cu|cuh)')

.PHONY: help venv install demo test check ctest cuda-compile bench gpu clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## */\t/' | expand -t 16

venv: .venv/ready ## .venv with what builds the package
.venv/ready: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q torch "setuptools>=77" ninja cmake
	touch $@

install: .venv/installed ## compiles and installs the package into .venv, editable
.venv/installed: .venv/ready $(BUILT_FROM)
	$(BIN)/python -m pip install -q --no-build-isolation -e ".[test,check]"
	$(BIN)/python -c 'from fdpg_fast._build import load; i = load().build_info(); \
	  print("fdpg_fast: CUDA extension", "on:" if i["cuda"] else "off:", i["cuda_reason"])'
	touch $@

demo: install ## tunes the embedded model; ends with a table, samples and a report
	$(BIN)/fdpg train demo --out runs/demo --resume

test: install ## every test: C++, emulated CUDA, Python, end to end
	$(BIN)/python -m pytest -n auto

check: install ## ruff, mypy --strict, clang-format, import law
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/python -m pytest -q tests/test_layering.py

ctest: venv ## the torch-free kernels and their C++ tests
	cmake -S . -B build/cmake -G Ninja
	cmake --build build/cmake
	ctest --test-dir build/cmake --output-on-failure

cuda-compile: venv ## nvcc compiles every CUDA file and its binding for sm_80 and sm_90; no GPU needed
	cmake -S . -B build/cuda -G Ninja -DFDPG_CUDA=ON -DFDPG_TORCH_INCLUDE="$$($(BIN)/python -c \
	  'from torch.utils.cpp_extension import include_paths; print(";".join(include_paths()))')"
	cmake --build build/cuda --target fdpg_cuda fdpg_cuda_binding gpu_tests

BENCHMARKS ?= benchmarks
bench: install ## every benchmark, or those that BENCHMARKS="FILE ..." names; and the tables of benchmarks/README.md
	$(BIN)/python -m pytest $(BENCHMARKS) -o python_files='bench_*.py' -o addopts=--strict-markers -W default -s
	$(BIN)/python benchmarks/tables.py

gpu: venv ## on a machine with a GPU: the CUDA extension, every test, compute-sanitizer, benchmarks
	FDPG_CUDA=1 $(BIN)/python -m pip install -q --no-build-isolation -e ".[test,check]"
	cmake -S . -B build/gpu -G Ninja -DFDPG_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES=native
	cmake --build build/gpu --target gpu_tests
	ctest --test-dir build/gpu -L gpu --output-on-failure
	for test in build/gpu/tests/gpu_*; do for tool in memcheck racecheck synccheck; do \
	  compute-sanitizer --error-exitcode 1 --report-api-errors no --tool $$tool $$test; done; done
	$(BIN)/python -m pytest -n auto
	FDPG_TEST_GPU=1 $(BIN)/python -m pytest -m gpu
	FDPG_TEST_GPU=1 $(BIN)/python -m pytest tests/test_end_to_end.py
	$(MAKE) bench

clean: ## build products; keeps .venv and runs
	rm -rf build dist *.egg-info fdpg_fast/_C*.so .venv/installed
