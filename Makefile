# SPDX-License-Identifier: Apache-2.0
# `make demo` and `make test` do all of their own set-up; `make help` lists the rest.
SHELL := /bin/bash
PYTHON ?= python3.11
VENV := .venv
BIN := $(abspath $(VENV))/bin
READY := $(VENV)/.ready
export PATH := $(BIN):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint bench clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(READY)  ## the environment, in .venv

# torch first: a wheel that pip finds at hand (a CPU build, say) is kept, and nothing after it asks for another.
$(READY): setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip "setuptools>=77" wheel
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --no-build-isolation -c constraints.txt -e ".[dev]"
	touch $@

demo: $(READY)  ## phantoms, preparation, a tiny pretraining, what it has learnt
	bash benchmarks/demo.sh

test: $(READY)  ## all tests
	OMP_NUM_THREADS=1 python -m pytest -q -n 2 --dist loadfile

lint: $(READY)  ## ruff and mypy
	ruff check .
	ruff format --check .
	mypy volta_components

bench: $(READY)  ## benchmarks, printed as a table of ratios
	python benchmarks/run.py

clean:  ## remove environment and build output, keep data and runs
	rm -rf $(VENV) build dist *.egg-info
