# kproxy: everything a developer or a newcomer runs. `make` alone lists it.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.ready
RUN := $(VENV)/bin/python
# where Debian puts iptables, nft and ip, and an ordinary user's PATH does not look
export PATH := $(PATH):/usr/local/sbin:/usr/sbin:/sbin

# of `make test`: files or folders, by default all tests
TESTS ?=

# of `make fresh`: Debian releases, and checks of tests/fresh/fresh.sh; CHECKS=short takes a few minutes
RELEASES ?= bookworm trixie
CHECKS ?= demo test

# of `make bench`: small, medium or large; the modes; where results and chart go; earlier results to compare with
SIZE ?= medium
MODES ?= iptables,nftables
JSON ?= build/bench.json
CHART ?= build/bench.svg
COMPARE ?=

# of `make image` and `make kind-up`: the image's name; another base (`make image-base` makes one where no registry is
# reachable); docker, podman or buildah, by default the first that works
IMAGE ?= localhost/kproxy:dev
BASE ?=
ENGINE ?=
LOCAL_BASE := localhost/kproxy-base:bookworm

.DEFAULT_GOAL := help
.PHONY: help setup packages demo test fresh check bench clean image image-base image-test kind-up kind-test kind-down

help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: packages $(STAMP) ## install the system packages and .venv/bin/kproxy

packages:
	@PYTHON="$(PYTHON)" sh tests/packages.sh tests

# pip's own setuptools would build python-iptables in a way that pip calls deprecated in three lines.
$(STAMP): export PIP_USE_PEP517 := 1
$(STAMP): pyproject.toml constraints.txt | packages
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "kproxy needs Python 3.11 or newer: $(PYTHON) is $$($(PYTHON) -V); name another with make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup ## see it work: pods, a Service, real requests, in less than half a minute
	@$(RUN) -m tests.demo

test: setup ## run all tests, those on the real kernel included
	$(RUN) -m pytest -q --numprocesses=auto --dist=worksteal $(TESTS)

fresh: ## as root: run the README's commands on a minimal Debian, for each of RELEASES in fresh roots by debootstrap
	@sh tests/packages.sh fresh
	@for release in $(RELEASES); do sh tests/fresh/fresh.sh "$$release" $(CHECKS) || exit; done

check: setup ## format, lint, types
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

bench: setup ## measure the costs beside their floors; SIZE=small ends in 3 minutes
	@$(RUN) -m tests.bench --size=$(SIZE) --modes=$(MODES) --json=$(JSON) --chart=$(CHART) $(if $(COMPARE),--compare=$(COMPARE))

image: ## build the image IMAGE with docker, podman or buildah
	@ENGINE="$(ENGINE)" sh deploy/image/image.sh build $(IMAGE) $(BASE)

image-base: ## make a base for it by debootstrap, called localhost/kproxy-base:bookworm, where no registry is reachable
	@ENGINE="$(ENGINE)" sh deploy/image/image.sh base $(LOCAL_BASE)

image-test: setup ## build the image on a base of our own and run it under the manifest's privileges, as root
	@sh tests/packages.sh image
	@ENGINE=$(or $(ENGINE),buildah) RUN=$(RUN) sh deploy/image/image.sh trial $(LOCAL_BASE)

kind-up: ## make a kind cluster without kube-proxy, and kproxy in it
	@ENGINE="$(ENGINE)" sh deploy/kind.sh up $(IMAGE)

kind-test: setup ## run the end-to-end tests against it
	@KUBECONFIG=$(CURDIR)/build/kind.kubeconfig $(RUN) -m pytest -q tests/e2e

kind-down: ## delete it
	@sh deploy/kind.sh down

clean: ## remove what the other targets made
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
