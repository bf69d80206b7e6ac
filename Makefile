# Everything that developers and new users run. `make` without a target lists the targets.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.ready
RUN := $(VENV)/bin/python
# Debian installs iptables, nft and ip in /usr/sbin, which is not in an ordinary user's PATH.
export PATH := $(PATH):/usr/local/sbin:/usr/sbin:/sbin

# make test: files or directories; all tests by default.
TESTS ?=

# make fresh: Debian releases, and checks from tests/fresh/fresh.sh. CHECKS=short takes a few minutes.
RELEASES ?= bookworm trixie
CHECKS ?= demo test

# make bench: small, medium or large; proxy modes; output files; earlier results to compare with.
SIZE ?= medium
MODES ?= iptables,nftables
JSON ?= build/bench.json
CHART ?= build/bench.svg
COMPARE ?=

# make soak: duration in seconds; proxy mode, iptables, nftables or both; seed of a run to repeat.
SECONDS ?= 600
SEED ?=

# make repair-times: number of Services. MODE is nftables, iptables-nft, iptables-legacy or all.
SERVICES ?= 10

# make image, make kind-up: name of the image; base image (`make image-base` builds one without a registry);
# docker, podman or buildah, by default the first one that works.
IMAGE ?= localhost/kproxy:dev
BASE ?=
ENGINE ?=
LOCAL_BASE := localhost/kproxy-base:bookworm

# make kind-up: proxy mode, iptables or nftables; node image, which selects the Kubernetes version of a new cluster,
# by default kind's own.
MODE ?=
NODE_IMAGE ?=

.DEFAULT_GOAL := help
.PHONY: help setup packages demo recording test fresh check bench soak repair-times \
    image image-base image-test kind-up kind-test kind-down clean

help: ## list these targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: packages $(STAMP) ## install system packages, and kproxy with its dependencies in .venv

packages:
	@PYTHON="$(PYTHON)" sh tests/packages.sh tests

# Without PEP 517, pip prints three lines of deprecation warnings when it builds python-iptables.
$(STAMP): export PIP_USE_PEP517 := 1
$(STAMP): pyproject.toml constraints.txt | packages
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "kproxy requires Python 3.11 or newer, but $(PYTHON) is $$($(PYTHON) -V); select another one with make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup ## show a Service under continuous requests in network namespaces, in less than half a minute
	@$(RUN) -m tests.demo

recording: setup ## run the demo and record it in docs/pictures/demo.svg
	@$(RUN) -m tests.demo.recording docs/pictures/demo.svg

test: setup ## run all tests, including those that program the kernel
	$(RUN) -m pytest -q --numprocesses=auto --dist=worksteal $(TESTS)

fresh: ## run `make demo` and `make test` on minimal Debian installations created by debootstrap; needs root
	@sh tests/packages.sh fresh
	@for release in $(RELEASES); do sh tests/fresh/fresh.sh "$$release" $(CHECKS) || exit; done

check: setup ## check formatting, lint and types
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

bench: setup ## run the benchmark; SIZE=small takes 3 minutes
	@$(RUN) -m tests.bench --size=$(SIZE) --modes=$(MODES) --json=$(JSON) --chart=$(CHART) $(if $(COMPARE),--compare=$(COMPARE))

soak: setup ## run kproxy under random changes, faults and damages for 10 minutes; needs root; SECONDS=..., MODE=..., SEED=...
	@$(RUN) -m tests.soak --seconds=$(SECONDS) $(if $(MODE),--mode=$(MODE)) $(if $(SEED),--seed=$(SEED))

repair-times: setup ## measure how fast kproxy repairs rules that others damage; needs root; SERVICES=..., MODE=...
	@$(RUN) -m tests.drift_times --services=$(SERVICES) $(if $(MODE),--mode=$(MODE))

image: ## build the container image with docker, podman or buildah
	@ENGINE="$(ENGINE)" sh deploy/image/image.sh build $(IMAGE) $(BASE)

image-base: ## build a base image with debootstrap, for machines without access to a registry
	@ENGINE="$(ENGINE)" sh deploy/image/image.sh base $(LOCAL_BASE)

image-test: setup ## build the image and test it with the privileges of the DaemonSet; needs root
	@sh tests/packages.sh image
	@ENGINE=$(or $(ENGINE),buildah) RUN=$(RUN) sh deploy/image/image.sh trial $(LOCAL_BASE)

kind-up: ## create a kind cluster with kproxy as its only service proxy; options: MODE=nftables, NODE_IMAGE=kindest/node:...
	@ENGINE="$(ENGINE)" MODE="$(MODE)" NODE_IMAGE="$(NODE_IMAGE)" sh deploy/kind.sh up $(IMAGE)

kind-test: setup ## run the end-to-end tests on the kind cluster
	@KUBECONFIG=$(CURDIR)/build/kind.kubeconfig $(RUN) -m pytest -q tests/e2e

kind-down: ## delete the kind cluster
	@sh deploy/kind.sh down

clean: ## remove build artifacts, caches and .venv
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
