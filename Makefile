# make demo   train the embedded example and show what it learned      make test   run the tests
# make setup  create .venv for both (nothing when it is there)         make lint   ruff
# make peers  add TRL, Liger-Kernel and cut-cross-entropy, which tests and benchmarks compare with
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PEERS := $(VENV)/.peers-installed
NATIVE := $(wildcard csrc/*) kernels/setup.py kernels/pyproject.toml

.PHONY: setup peers demo test lint clean
setup: $(STAMP)
peers: $(PEERS)

# torch comes first: the C++ kernels are compiled against the one that will load them.
$(STAMP): constraints.txt pyproject.toml $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt pip setuptools wheel ninja
	$(BIN)/python -m pip install -q -c constraints.txt torch numpy
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e ./kernels -e '.[dev]'
	touch $(STAMP)

# The trainers and kernels we are compared with, in the same environment: a comparison is one process.
$(PEERS): $(STAMP)
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[peers]'
	touch $(PEERS)

demo: setup
	rm -rf runs/demo
	$(BIN)/airl-fast train tiny --run-name demo

# Two processes of one thread each: the tests are many and small. A file stays in one process, with its fixtures.
test: setup peers
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) build dist kernels/build kernels/*.egg-info *.egg-info kernels/airl_kernels/_native.so
