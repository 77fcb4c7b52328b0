# make venv   the environment in .venv: pinned packages, a CPU build of torch where there is no GPU
# make test   the environment, then all tests
# make demo   the environment, then text from the demo model, its cache sharded over two ranks
# make clean  removes what the others made

# The first that really runs: version managers leave launchers for versions that are not there.
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
TORCH := torch==2.13.0
CPU_INDEX := https://download.pytorch.org/whl/cpu
NUM_GPUS := $(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU')

VENV := $(CURDIR)/.venv
PIP := $(VENV)/bin/pip --disable-pip-version-check
STAMP := $(VENV)/installed
REQUIREMENTS := requirements/locked.txt
ifeq ($(NUM_GPUS),0)
REQUIREMENTS += requirements/cpu.txt
endif

HAS_HEADERS := import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")

RANKS := 2
# A text that every machine has and that the demo model was not trained on, a pair in its midst, in a
# page of the second rank, and the question: the answer, 7, is the first byte of what comes out.
PROMPT := import inspect, sched; text = inspect.getsource(sched); \
	print(text[:720] + "@a7;" + text[720:1500] + "@a")
ON_CPU := DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES=

# DeepSpeed's operators are built when they are first used, not while it is installed. On a CPU one
# is always used, so a compiler must be there.
export DS_BUILD_OPS := 0
export PATH := $(VENV)/bin:$(PATH)

.PHONY: venv test demo clean
venv: $(STAMP)

$(STAMP): requirements/locked.txt requirements/cpu.txt requirements/kvpress.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: make PYTHON=..."; exit 1; }
ifeq ($(NUM_GPUS),0)
	@command -v $${CXX:-c++} >/dev/null && $(PYTHON) -c '$(HAS_HEADERS)' 2>/dev/null \
	|| { echo "A C++ compiler and Python.h are needed (Debian: apt install g++ python3-dev)"; exit 1; }
endif
	@echo "Making $(VENV) with $(PYTHON); GPUs found: $(NUM_GPUS)"
	$(PYTHON) -m venv $(VENV)
# A plain "torch" brings several GB of CUDA libraries, so a machine without a GPU asks for the CPU
# build: by name, for indexes that hold it, then from PyTorch's own index.
ifeq ($(NUM_GPUS),0)
	$(PIP) install "$(TORCH)+cpu" \
	|| { echo "No $(TORCH)+cpu there; trying $(CPU_INDEX)"; \
	     $(PIP) install "$(TORCH)" --index-url $(CPU_INDEX); } \
	|| { echo "Not reachable; trying plain $(TORCH)"; $(PIP) install "$(TORCH)"; }
else
	$(PIP) install "$(TORCH)"
endif
	$(PIP) install $(addprefix -r ,$(REQUIREMENTS))
# Without its dependencies, so that it changes no other package; its tests are skipped without it.
	$(PIP) install --no-deps -r requirements/kvpress.txt \
	|| echo "NVIDIA kvpress is not reachable: its bridge is left out, and its tests are skipped"
	$(PIP) install --no-deps --no-build-isolation -e .
	touch $@

# Two workers, as many tests use one core only; a file's tests share what they set up.
test: venv
	$(if $(filter 0,$(NUM_GPUS)),DS_ACCELERATOR=cpu) $(VENV)/bin/python -m pytest \
		--numprocesses 2 --dist loadfile

demo: venv
	$(if $(filter 0 1,$(NUM_GPUS)),$(ON_CPU)) $(VENV)/bin/deepspeed --num_accelerators $(RANKS) \
		--log_level warning launch/generate.py --model models/demo \
		--pikv configs/pikv/small_pages.yaml --prompt "$$($(VENV)/bin/python -c '$(PROMPT)')" \
		--temperature 0.6 --max-new-tokens 256

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .hypothesis
