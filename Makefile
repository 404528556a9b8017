# make demo   train the embedded example and show what it learned      make test   run the tests
# make setup  create .venv for both (nothing when it is there)         make lint   ruff
# make gpu-check OUT=dir   test and measure the operations on an NVIDIA GPU; $(PYTHON) needs torch, triton and numpy
# make test-processors   run the tests of the operations under other processors' arithmetic (SETTINGS=old for one)
# make gpu-preflight   before a GPU visit, without a GPU: everything that can be known about it (3 GB to download)
# make test-browser   run the tests of `airl-fast report` in Chromium, which must be installed
# make test-vllm   run the tests of the vLLM sampler against the real one, for the CPU, in .venv-vllm
# make peers  add TRL, Liger-Kernel and cut-cross-entropy, which tests and benchmarks compare with
# make peer-tests  run Liger-Kernel's own tests against our functions, and ours against verl and OpenRLHF
# make dist   build the source distributions and wheels of airl-kernels and airl-fast into dist/
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PEERS := $(VENV)/.peers-installed
VLLM_VENV := .venv-vllm
VLLM_STAMP := $(VLLM_VENV)/.installed
GPU_VENV := .venv-gpu
GPU_STAMP := $(GPU_VENV)/.installed
PEER_SITE := build/peers/site
PEER_STAMP := $(PEER_SITE)/.installed
DIST ?= dist
SDIST := 'import sys, setuptools.build_meta as b; b.build_sdist(sys.argv[1])'
NATIVE := $(wildcard csrc/*) kernels/setup.py kernels/pyproject.toml

.PHONY: setup peers peer-tests demo test test-processors test-browser test-vllm lint gpu-check gpu-preflight dist clean
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

# In a directory of their own, without dependencies: their pins are not ours. 100 MB to download, most of it Ray.
$(PEER_STAMP): tests/peers/requirements.txt
	DS_BUILD_OPS=0 $(BIN)/python -m pip install -q --no-deps --no-build-isolation --upgrade --target $(PEER_SITE) -r $<
	touch $@

# PEER_ARGS=--all adds the large shapes and every case under the interpreter (long without a GPU).
peer-tests: peers $(PEER_STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/integrations/test_verl.py tests/integrations/test_openrlhf.py
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.peers.liger $(PEER_ARGS)

demo: setup
	rm -rf runs/demo
	$(BIN)/airl-fast train tiny --run-name demo

# Two processes of one thread each: the tests are many and small. A file stays in one process, with its fixtures; files
# in their order, as xdist's own puts those of few tests, which are the slow ones, last.
test: setup peers
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# The same tests as the libraries of another processor compute: python -m tests.processors -h names the settings.
test-processors: setup peers
	$(BIN)/python -m tests.processors $(SETTINGS)

# A test that finds no browser fails here; within `make test` it is skipped. Screenshots go to build/screenshots.
test-browser: setup
	OMP_NUM_THREADS=1 AIRL_NEEDS_BROWSER=1 $(BIN)/python -m pytest -s tests/browser

# vLLM pins what it needs, so its list is installed as it stands. airl-fast follows from this directory.
$(VLLM_STAMP): constraints-vllm.txt pyproject.toml $(NATIVE)
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install -q --no-deps -r constraints-vllm.txt
	$(VLLM_VENV)/bin/python -m pip install -q --no-deps --no-build-isolation -e ./kernels -e .
	touch $(VLLM_STAMP)

test-vllm: $(VLLM_STAMP)
	OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest -n 2 --dist loadfile tests/vllm

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Without an environment or an installation of the project: the sources are used where they are, and beside them the
# packages that `python -m bench.carry` laid out. GPU_CHECK=--rehearse does it on a CPU at toy shapes.
OUT ?= gpu-check
gpu-check:
	PYTHONPATH=kernels:. $(PYTHON) -m bench.gpu_check "$(OUT)" $(GPU_CHECK)

# The GPU machine's Python is 3.12; without one, the Python at hand, which the preflight's table names. JOBS: processes.
GPU_PYTHON ?= $(shell for p in python3.12 $$HOME/.pyenv/versions/3.12*/bin/python3.12 $(PYTHON); do \
	"$$p" -c pass 2>/dev/null && echo "$$p" && break; done)
JOBS ?= $(shell nproc)
$(GPU_STAMP): constraints-gpu.txt
	test -x $(GPU_VENV)/bin/python || $(GPU_PYTHON) -m venv $(GPU_VENV)
	$(GPU_VENV)/bin/python -m pip install -q --no-deps -r constraints-gpu.txt
	touch $@

gpu-preflight: $(GPU_STAMP)
	OMP_NUM_THREADS=1 PYTHONPATH=kernels:.:.carry $(GPU_VENV)/bin/python -m bench.preflight --jobs $(JOBS)

# The wheels come from the source distributions, which thereby hold all that is needed, and no stale build folder.
dist: setup
	rm -rf "$(DIST)"
	mkdir -p "$(DIST)"
	dist=$$(cd "$(DIST)" && pwd) && cd kernels && $(abspath $(BIN))/python -c $(SDIST) "$$dist"
	dist=$$(cd "$(DIST)" && pwd) && $(abspath $(BIN))/python -c $(SDIST) "$$dist"
	AIRL_KERNELS_NATIVE=0 $(BIN)/python -m pip wheel -q --no-deps --no-build-isolation -w "$(DIST)" "$(DIST)"/*.tar.gz

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(GPU_VENV) build dist kernels/build kernels/*.egg-info *.egg-info kernels/airl_kernels/_native.so
