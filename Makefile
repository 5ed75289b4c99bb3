# Every target works on a fresh clone: what needs the environment makes it first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/python -m pip
OPS := $(VENV)/.ops
CODE := $(wildcard gma model export service deploy loadtest benchmarks tests hatch_build.py)
CXX_CODE := $(shell find model/ops/cpu export/ops -name "*.cc" -o -name "*.h")
KERNELS := $(wildcard model/ops/cpu/*.cc model/ops/cpu/*.h)

.DEFAULT_GOAL := help
.PHONY: help install ops serve test check format lock clean

help:  ## Show this help
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | column -t -s '|'

install: $(INSTALLED)  ## Make .venv with everything, as pinned in requirements.lock

# torch goes first and alone: no other package's requirements choose its build. The last compiles the
# kernels for the CPU, with a C++ compiler if there is one.
$(INSTALLED): pyproject.toml requirements.lock hatch_build.py $(KERNELS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint requirements.lock torch hatchling
	$(PIP) install --quiet --constraint requirements.lock --no-build-isolation --editable '.[dev]'
	@touch $@

ops: $(OPS)  ## Build ONNX Runtime's operators; needs a C++ compiler

# CMake and Ninja come with the build's own environment if the machine has none.
$(OPS): $(INSTALLED) $(KERNELS) $(shell find export/ops -type f -not -name '*.pyc')
	include=$$(export/ops/headers.sh build/onnxruntime) && ONNXRUNTIME_INCLUDE=$$include \
	  $(PIP) install --quiet --force-reinstall --no-deps --config-settings=build-dir=$(CURDIR)/build/ops ./export/ops
	@touch $@

serve: $(INSTALLED)  ## Start the service; settings are GMA_* variables
	$(BIN)/gma serve

# A process a core; tests/conftest.py says which tests share one.
test: $(INSTALLED)  ## Run the tests; ARGS="-k stream" chooses some, ARGS="-m long" the longer ones
	$(BIN)/python -m pytest -n auto $(ARGS)

check: $(INSTALLED)  ## Lint, check format and types, and the rules of the architecture
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/clang-format --dry-run -Werror $(CXX_CODE)
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_architecture.py

format: $(INSTALLED)  ## Format the code and mend what the linter can mend
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)
	$(BIN)/clang-format -i $(CXX_CODE)

# A fresh environment of the newest versions that pyproject.toml allows, but for torch, and triton, which
# torch's builds for GPUs require in one version: edit both pins in requirements.lock to move them.
# CUDA's packages are left out, for torch's own build chooses them.
lock:  ## Pin the newest versions of everything but torch and triton in requirements.lock
	rm -rf .lock-venv
	$(PYTHON) -m venv .lock-venv
	.lock-venv/bin/python -m pip install --quiet $$(grep -E '^(torch|triton)==' requirements.lock) hatchling
	.lock-venv/bin/python -m pip install --quiet --no-build-isolation --editable '.[dev]'
	{ echo '# Every version that is tested together. Made by `make lock`; a pip constraints file.'; \
	  .lock-venv/bin/python -m pip freeze --all --exclude pip --exclude-editable \
	    | grep -Ev '^(nvidia-|cuda-)' | sed -E 's/^((torch|triton)==[0-9.]+)\+.*/\1/'; } > .lock-venv/lock
	mv .lock-venv/lock requirements.lock
	rm -rf .lock-venv

clean:  ## Remove the environment and the caches
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis
