# Every target builds .venv from nothing: Python 3.10+ and pip are all that is needed.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-machines kernels check bench gpu clean

demo: .venv/lab       ## train a TopK SAE and a joint SAE on a real model's activations, and compare them
	$(BIN)/fastsae demo

# Two processes of one thread each: most tests are too small for two threads. A file stays with one process.
test: .venv/dev       ## everything that can be proved without a GPU
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile
	TRITON_INTERPRET=1 $(BIN)/pytest tests/kernels -n 2
	$(BIN)/python -m csrc_triton.offline modern odd small narrow few wider

test-machines: .venv/dev ## the tests as other processors compute them, on one thread and on two
	$(BIN)/python tests/machines.py

# What a GPU took stands beside what was predicted for an H200.
MEASURED := $(wildcard benchmarks/results/nvidia-h200.json benchmarks/results/nvidia-*.json)

kernels: .venv/dev    ## compile every kernel for six chips without a GPU, check it, and write docs/kernels.md
	$(BIN)/python -m csrc_triton.offline --write docs/kernels.md $(addprefix --measured ,$(firstword $(MEASURED)))
	$(BIN)/python -m csrc_triton.offline --chips 86 89 100 120

check: .venv/dev      ## what a change must pass: format, lint, types, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(MAKE) test

bench: .venv/dev      ## measure this machine's CPU beside the peers: benchmarks/results/, tables and plots
	$(BIN)/pytest benchmarks --suite cpu --results
	$(BIN)/python -m benchmarks.report

# With `make gpu PYTHON=...` that interpreter runs it, with its own torch and triton, and nothing is installed.
ifeq ($(origin PYTHON),command line)
gpu:                  ## correctness and speed on an NVIDIA GPU
	$(PYTHON) -m benchmarks.gpu
else
gpu: .venv/dev
	$(BIN)/python -m benchmarks.gpu
endif

clean:
	rm -rf .venv runs

.venv/pip:
	$(PYTHON) -m venv .venv
	touch $@

# One stamp per set of extras; a changed constraint or dependency installs again.
.venv/lab .venv/dev: .venv/%: .venv/pip constraints.txt pyproject.toml
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[$(EXTRAS_$*)]"
	$(AFTER_$*)
	touch $@

EXTRAS_lab := lab
EXTRAS_dev := dev
# It pins an nnsight that pins much else, and that its trainers do not need.
AFTER_dev := $(BIN)/pip install --quiet --constraint constraints.txt --no-deps dictionary-learning
