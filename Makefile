# make demo   train the embedded example and show what it learned      make test   run the tests
# make setup  create .venv for both (nothing when it is there)         make lint   ruff
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
NATIVE := $(wildcard csrc/*) kernels/setup.py kernels/pyproject.toml

.PHONY: setup demo test lint clean
setup: $(STAMP)

# torch comes first: the C++ kernels are compiled against the one that will load them.
$(STAMP): constraints.txt pyproject.toml $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt pip setuptools wheel ninja
	$(BIN)/python -m pip install -q -c constraints.txt torch numpy
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e ./kernels -e '.[dev]'
	touch $(STAMP)

demo: setup
	rm -rf runs/demo
	$(BIN)/airl-fast train tiny --run-name demo

# Two processes of one thread each: the tests are many and small. A file stays in one process, with its fixtures.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) build dist kernels/build kernels/*.egg-info *.egg-info kernels/airl_kernels/_native.so
