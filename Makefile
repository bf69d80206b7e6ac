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

# make kernels: Debian releases whose stock kernels are tested.
KERNELS ?= bookworm trixie sid

# make fuzz: duration in seconds, and the seed of the first turn; by default a random one, which the output shows.
DURATION ?= 60
SEED ?=

# make bench: small, medium, large or huge; proxy modes; output files; earlier results to compare with; command of
# another service proxy; number of endpoints of each Service.
SIZE ?= medium
MODES ?= iptables,nftables
JSON ?= build/bench.json
CHART ?= build/bench.svg
COMPARE ?=
BESIDE ?=
ENDPOINTS ?=

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

# make audit, make image-pins: the tools that only these targets use.
PIP_AUDIT := pip-audit==2.10.1
PIP_TOOLS := pip-tools==7.6.2

# make kind-up: proxy mode, iptables or nftables; node image, which selects the Kubernetes version of a new cluster,
# by default kind's own.
MODE ?=
NODE_IMAGE ?=

.DEFAULT_GOAL := help
.PHONY: help setup packages demo recording test fuzz soak repair-times fresh kernels check audit bench api-cost \
    image-pins image image-base image-test kind-up kind-test kind-down clean

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
	PYTHONHASHSEED=$${PYTHONHASHSEED:-0} $(RUN) -m pytest -q --numprocesses=auto --dist=worksteal $(TESTS)

fuzz: setup ## feed mutated inputs to all parsers for DURATION seconds, 60 by default
	@$(RUN) -m tests.fuzz --seconds=$(DURATION) $(if $(SEED),--seed=$(SEED))

fresh: ## run `make demo` and `make test` on minimal Debian installations created by debootstrap; needs root
	@sh tests/packages.sh fresh
	@for release in $(RELEASES); do sh tests/fresh/fresh.sh "$$release" $(CHECKS) || exit; done

kernels: setup ## test on stock kernels of Debian in QEMU, about 10 minutes each; needs the network; KERNELS="bookworm trixie sid"
	@sh tests/packages.sh kernels
	@$(RUN) -m tests.kernels $(KERNELS)

check: setup ## check formatting, lint and types
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

# pip-audit is not a dependency of the other targets, and needs the network.
audit: ## look up all pinned dependencies in the database of known vulnerabilities; needs the network
	$(PYTHON) -m venv build/audit
	build/audit/bin/pip install --quiet --disable-pip-version-check $(PIP_AUDIT)
	build/audit/bin/pip-audit --strict --disable-pip --require-hashes -r deploy/image/requirements.txt -r deploy/image/build-requirements.txt
	build/audit/bin/pip-audit --strict --disable-pip --no-deps -r constraints.txt

bench: setup ## run the benchmark; SIZE=small takes 3 minutes
	@$(RUN) -m tests.bench --size=$(SIZE) --modes=$(MODES) --json=$(JSON) --chart=$(CHART) $(if $(COMPARE),--compare=$(COMPARE)) \
	    $(if $(ENDPOINTS),--endpoints=$(ENDPOINTS)) $(if $(BESIDE),--beside='$(BESIDE)')

api-cost: setup ## measure and compute what kproxy costs the API servers of a cluster with 5,000 nodes
	@$(RUN) -m tests.api_cost

soak: setup ## run kproxy under random changes, faults and damages for 10 minutes; needs root; SECONDS=..., MODE=..., SEED=...
	@$(RUN) -m tests.soak --seconds=$(SECONDS) $(if $(MODE),--mode=$(MODE)) $(if $(SEED),--seed=$(SEED))

repair-times: setup ## measure how fast kproxy repairs rules that others damage; needs root; SERVICES=..., MODE=...
	@$(RUN) -m tests.drift_times --services=$(SERVICES) $(if $(MODE),--mode=$(MODE))

# The image's dependencies and their dependencies, in the versions of constraints.txt, with the hashes of all their files.
image-pins: ## write the requirements of the image after a change of dependencies or constraints.txt; needs the network
	$(PYTHON) -m venv build/pins
	build/pins/bin/pip install --quiet --disable-pip-version-check $(PIP_TOOLS)
	$(PYTHON) deploy/image/requirements.py pyproject.toml > build/pins/requirements.in
	echo setuptools > build/pins/build-requirements.in
	for file in requirements build-requirements; do \
		{ sed -n '1s/^#/#/p' deploy/image/$$file.txt; \
		build/pins/bin/pip-compile --quiet --generate-hashes --allow-unsafe --strip-extras --no-annotate --no-header \
			--no-emit-options -c constraints.txt -o - build/pins/$$file.in; } > build/pins/$$file.txt && \
		mv build/pins/$$file.txt deploy/image/$$file.txt || exit; \
	done

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
