# Every target builds .venv from nothing: Python 3.10+ and pip are all that is needed.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check bench gpu clean

demo: .venv/lab       ## train a TopK SAE and a joint SAE on a real model's activations, and compare them
	$(BIN)/fastsae demo

test: .venv/dev       ## everything that can be proved without a GPU
	$(BIN)/pytest

check: .venv/dev      ## what a change must pass: format, lint, types, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/pytest

bench: .venv/peers    ## measure this machine's CPU beside the peers, and update the README's table
	$(BIN)/pytest benchmarks --shape bench --results
	$(BIN)/python -m benchmarks.report

gpu: .venv/dev        ## the same on an NVIDIA GPU; says so where there is nothing to measure
	$(BIN)/python -m benchmarks.gpu

clean:
	rm -rf .venv runs

.venv/pip:
	$(PYTHON) -m venv .venv
	touch $@

# One stamp per set of extras; a changed constraint or dependency installs again.
.venv/lab .venv/dev .venv/peers: .venv/%: .venv/pip constraints.txt pyproject.toml
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[$(EXTRAS_$*)]"
	touch $@

EXTRAS_lab := lab
EXTRAS_dev := dev
EXTRAS_peers := dev,peers
