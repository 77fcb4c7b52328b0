# make test: the environment, then all tests.

PYTHON ?= $(firstword $(shell command -v python3.11 python3.12 python3))
TORCH_VERSION := 2.13.0
CPU_INDEX := https://download.pytorch.org/whl/cpu
HAS_GPU := $(shell command -v nvidia-smi)
VENV := .venv
STAMP := $(VENV)/installed

export DS_BUILD_OPS := 0
ifeq ($(HAS_GPU),)
export DS_ACCELERATOR := cpu
endif

.PHONY: venv test clean
venv: $(STAMP)

# A plain `pip install torch` takes a CUDA build of several GB: ask for the CPU build by name first.
$(STAMP): requirements/locked.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
ifeq ($(HAS_GPU),)
	$(VENV)/bin/pip install "torch==$(TORCH_VERSION)+cpu" || \
	$(VENV)/bin/pip install "torch==$(TORCH_VERSION)" --index-url $(CPU_INDEX)
else
	$(VENV)/bin/pip install "torch==$(TORCH_VERSION)"
endif
	$(VENV)/bin/pip install -r requirements/locked.txt
	$(VENV)/bin/pip install --no-deps --no-build-isolation -e .
	touch $(STAMP)

test: venv
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(VENV)/bin/python -m pytest

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .hypothesis
