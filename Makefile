# Two commands for users, `make demo` and `make test`; each sets up .venv if it is not there.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A machine whose Python already has a suitable torch (a CUDA or ROCm build, say) keeps it.
# (Not one of an activated virtual environment, which .venv would not see.)
HAS_TORCH := $(shell $(PYTHON) -c "import torch, sys; sys.exit(sys.prefix != sys.base_prefix or \
	tuple(map(int, torch.__version__.split('.')[:2])) < (2, 10))" 2>/dev/null && echo yes)

PYTEST := -m pytest -n logical --maxprocesses=8 --dist worksteal

# An environment with the oldest Triton, in which kernels are compiled and not run.
TRITON36 := .venv-triton36

.PHONY: help setup test test-all test-triton36 demo lint format bench aot prebuilt gpu doctor clean

help:
	@echo "make demo    train three arms on two-digit addition: imitation, reward, hybrid"
	@echo "make test    run the tests: every argument once, on both backends"
	@echo "make test-all  the full matrix, as CI does"
	@echo "make test-triton36  whether kernels compile and travel on Triton 3.6"
	@echo "make lint    ruff and pyright"
	@echo "make bench   benchmark the ops on this machine"
	@echo "make aot     what two releases of Triton make of the kernels, side by side"
	@echo "make prebuilt  compile what a lent H100 or H200 will launch (bench/GPU.md)"
	@echo "make gpu     on a GPU: right or wrong, times, peers, tests; nine minutes (bench/GPU.md)"
	@echo "make doctor  what this machine will use, and whether it computes right"

setup: $(VENV)/ready

$(VENV)/ready: pyproject.toml requirements/torch.txt
	$(PYTHON) -m venv $(if $(HAS_TORCH),--system-site-packages) $(VENV)
	$(if $(HAS_TORCH),,$(BIN)/python -m pip install --quiet -r requirements/torch.txt)
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	@touch $@

# The torch backend and all else, then the Triton kernels in Triton's interpreter.
test: setup
	$(BIN)/python $(PYTEST)
	$(BIN)/python $(PYTEST) --backend=triton

test-all: setup
	$(BIN)/python $(PYTEST) --all
	$(BIN)/python $(PYTEST) --all --backend=triton

$(TRITON36)/ready: pyproject.toml requirements/torch.txt requirements/triton36.txt
	$(PYTHON) -m venv $(TRITON36)
	$(TRITON36)/bin/python -m pip install --quiet -r requirements/torch.txt
	$(TRITON36)/bin/python -m pip install --quiet -r requirements/triton36.txt
	$(TRITON36)/bin/python -m pip install --quiet --no-deps -e .
	@touch $@

test-triton36: $(TRITON36)/ready
	$(TRITON36)/bin/python $(PYTEST) --all tests/test_launches.py \
		tests/test_gpu_stages.py::test_prebuilt_kernels_are_found_by_another_build \
		tests/test_ahead_of_time.py::test_the_row_resident_form

prebuilt: $(TRITON36)/ready
	$(TRITON36)/bin/python -m bench prebuild

demo: setup
	$(BIN)/python -m train.demo

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	$(BIN)/python -m bench run

aot: setup $(TRITON36)/ready
	$(BIN)/python -m bench aot --beside $(TRITON36)/bin/python --save bench/results/aot-sm_90.md

gpu: setup
	$(BIN)/python -m bench gpu bench/results

doctor: setup
	$(BIN)/python -m hybrid_kernels

clean:
	rm -rf $(VENV) $(TRITON36) prebuilt build dist *.egg-info .pytest_cache .ruff_cache .hypothesis \
		.triton
