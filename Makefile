# kproxy: everything a developer or a newcomer runs. `make` alone lists it.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.ready
RUN := $(VENV)/bin/python

.DEFAULT_GOAL := help
.PHONY: help setup packages demo test check bench clean

help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: packages $(STAMP) ## install the system packages and .venv/bin/kproxy

packages:
	@sh tests/packages.sh

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "kproxy needs Python 3.11 or newer: $(PYTHON) is $$($(PYTHON) -V); name another with make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup ## see it work: pods, a Service, real requests, in half a minute
	@$(RUN) -m tests.demo

test: setup ## run all tests, those on the real kernel included
	$(RUN) -m pytest -q

check: setup ## format, lint, types
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

bench: setup ## measure the costs beside their floors; SIZE=small ends in a minute
	@$(RUN) -m tests.bench $(if $(filter small,$(SIZE)),--services 100 1000,--services 100 1000 5000)

clean: ## remove what the other targets made
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
