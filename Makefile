# SPDX-License-Identifier: Apache-2.0
# `make demo` and `make test` do all of their own set-up; `make help` lists the rest.
SHELL := /bin/bash
# Empty: the first Python from 3.11 on that tools/find_python.sh finds. It makes the environments.
PYTHON ?=
VENV := .venv
BIN := $(abspath $(VENV))/bin
READY := $(VENV)/.ready
LABEL_VENV := .venv-label
LABEL_READY := $(LABEL_VENV)/.ready
LABEL_PYTHON := $(abspath $(LABEL_VENV))/bin/python
CALLER_PATH := $(PATH)
export PATH := $(BIN):$(PATH)

# $(call environment,FOLDER): make a virtual environment there, unless there is one with pip.
environment = $(1)/bin/python -m pip --version >/dev/null 2>&1 || \
    { python=$$(PATH="$(CALLER_PATH)" tools/find_python.sh "$(PYTHON)") && "$$python" -m venv --clear $(1); }

.DEFAULT_GOAL := help
.PHONY: help setup demo study test label test-label test-gpu lint bench bench-gpu clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(READY)  ## the environment, in .venv

$(READY): setup.cfg pyproject.toml tools/install.sh $(wildcard locks/*.txt) volta_components/_version.py
	@$(call environment,$(VENV))
	bash tools/install.sh "$(BIN)/python" setup
	"$(BIN)/python" -m pip install --quiet --no-deps --no-build-isolation -e .
	"$(BIN)/python" -m pip check
	touch $@

demo: $(READY)  ## phantoms, preparation, a tiny pretraining, what it has learnt: make demo [ANATOMIES=DIR]
	bash benchmarks/demo.sh

ANATOMIES ?=
SIZE ?= cores
JOBS ?= 2
LONGER ?= 1

study: $(READY)  ## what pretraining is worth, on synthetic heads: make study ANATOMIES=DIR [SIZE=tiny|small|cores|paper] [JOBS=2] [LONGER=1]
	python -m benchmarks.study $(if $(ANATOMIES),"$(ANATOMIES)") --size "$(SIZE)" --jobs "$(JOBS)" --longer "$(LONGER)"

test: $(READY)  ## all tests but the MONAI Label server's and the GPU's
	OMP_NUM_THREADS=1 python -m pytest -q -n 2 --dist loadfile -m "not label_server"

# MONAI Label needs releases that do not go with .venv's; see label/requirements.txt.
$(LABEL_READY): tools/install.sh $(wildcard locks/*.txt label/install.sh label/standin/*/*) setup.cfg pyproject.toml volta_components/_version.py
	@$(call environment,$(LABEL_VENV))
	bash label/install.sh "$(LABEL_PYTHON)" --no-build-isolation -e .
	touch $@

STUDIES ?=
PORT ?= 8000
HOST ?= 127.0.0.1
NAMES ?=
ORIGINS ?=
TRUST ?=
BUNDLE ?=
APP ?= apps/label

label: $(LABEL_READY)  ## MONAI Label server: make label STUDIES=DIR [PORT=8000] [HOST=127.0.0.1] [BUNDLE=DIR] [APP=DIR]
	@"$(LABEL_PYTHON)" label/serve.py --studies "$(STUDIES)" --port "$(PORT)" --host "$(HOST)" --bundle "$(BUNDLE)" --app "$(APP)" \
	    --names "$(NAMES)" --origins "$(ORIGINS)" --trust "$(TRUST)"

test-label: $(READY) $(LABEL_READY)  ## tests with a real MONAI Label server
	LABEL_TESTS=required OMP_NUM_THREADS=1 python -m pytest -q -m label_server

test-gpu: $(READY)  ## each training and inference once on the GPU
	VOLTA_TEST_GPU=1 python -m pytest -q tests/integration/test_gpu.py

lint: $(READY)  ## ruff, mypy, the layout of the configs and the list of what they run
	ruff check .
	ruff format --check .
	python -m tools.format_json --check bundles/*/configs/*.json volta_components/data/fetch/resources/*.json
	python -m tools.own_texts --check
	mypy volta_components tools

bench: $(READY)  ## benchmarks, printed as a table of ratios
	python benchmarks/run.py

bench-gpu: $(READY)  ## what only a GPU can tell, into benchmarks/results/gpu.md
	bash benchmarks/gpu.sh

clean:  ## remove environments and build output; data, runs and packed bundles stay
	rm -rf $(VENV) $(LABEL_VENV) build *.egg-info
