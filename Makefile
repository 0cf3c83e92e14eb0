# wellposed: `make help` lists the targets.
PYTHON ?= python3
# An index of CPU builds of torch, to save the download of a CUDA build: make test TORCH_INDEX=<address>
TORCH_INDEX ?=
VENV := .venv
RUN := $(VENV)/bin

export PYTHON TORCH_INDEX VENV

.DEFAULT_GOAL := help
.PHONY: help demo test slow lint types floors unit docs bench setup setup-dev clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

demo: setup  ## set up, then compare regularizers on handwritten digits with 40 % wrong labels (under 5 minutes)
	$(RUN)/wellposed compare digits --noise 0.4 --budget 260s

test: setup-dev  ## set up, then run everything that CI runs
	@scripts/check.sh

setup: $(VENV)/.installed-lab  ## create .venv with what the command needs

setup-dev: $(VENV)/.installed-dev  ## create .venv with what the checks need

$(VENV)/.installed-%: pyproject.toml constraints.txt scripts/setup.sh
	@scripts/setup.sh $*

lint: setup-dev  ## style and formatting
	@scripts/check.sh lint

types: setup-dev  ## static types
	@scripts/check.sh types

floors: setup-dev  ## who may import whom
	@scripts/check.sh floors

unit: setup-dev  ## tests and doctests
	@scripts/check.sh unit

slow: setup-dev  ## the tests marked slow
	$(RUN)/python -m pytest -m slow -n 2 --dist loadgroup

docs: setup-dev  ## regenerate the method pages and README's table from the cards
	$(RUN)/python scripts/generate_docs.py

bench: setup-dev  ## measure against the peers, one after another on an idle machine
	@scripts/bench.sh

clean:  ## remove the environment and what the tools left
	rm -rf $(VENV) .mypy_cache .ruff_cache .hypothesis .import_linter_cache build dist
