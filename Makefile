# Every target does its own set-up: a clean clone, make and Python 3.11+ are enough. `make` alone lists the targets.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
SHELL := /bin/bash

bin := .venv/bin
# The layers that decide. A branch that no test took is a decision that nobody has seen.
decides := sidecar/core sidecar/rules
# Tests with real processes: each file on its own, two at a time, the folders with the longest files first.
real := $(wildcard tests/kubernetes tests/faults tests/web tests/e2e)

# The layers that decide have unit tests of their own, which must take every line and branch of them.
define deciding
@$(bin)/python -m pytest -q -n 2 --dist worksteal tests/unit/core tests/unit/rules \
	$(addprefix --cov=,$(decides)) --cov-branch --cov-fail-under=100 --cov-report=term:skip-covered
endef

define others
@$(bin)/python -m pytest -q -n 2 --dist worksteal $(1) tests/property tests/unit --ignore=tests/unit/core --ignore=tests/unit/rules
endef

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s  %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: demo
demo: .venv ## See the switch fire, block and recover, on this machine
	@$(bin)/killswitch demo

.PHONY: test
test: setup lint ## Run the linters and all tests, end-to-end ones too
	$(deciding)
	$(call others)
	@$(bin)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(real)

.PHONY: check
check: .venv lint ## Run the linters and the quick tests: under a minute, for each commit
	$(deciding)
	$(call others,-m 'not slow')

.PHONY: fmt
fmt: .venv ## Format the code and apply the linter's safe fixes
	@$(bin)/ruff check --fix --quiet . || true
	@$(bin)/ruff format .

.PHONY: bench
bench: .venv ## Measure the gate, the page and an evaluation on this machine
	@$(bin)/python tests/benchmarks/run.py

.PHONY: faults
faults: setup ## Break what can break, for longer than `make test` does (FAULTS=30: so many times as often; an hour)
	@FAULTS=$${FAULTS:-30} $(bin)/python -m pytest -s --timeout 3600 tests/faults

.PHONY: fuzz
fuzz: .venv ## Fuzz what takes bytes from outside, by coverage: make fuzz SECONDS=600 TARGETS="gate_request state_file"
	@$(bin)/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps --only-binary :all: \
		--requirement .ci/requirements-fuzz.txt
	@$(bin)/python -m tests.faults.fuzz_by_coverage $(or $(SECONDS),60) $(TARGETS)

.PHONY: pictures
pictures: setup ## Draw the pictures in docs/images anew, from live data
	@$(bin)/python -m tests.web.pictures
	@command -v npm >/dev/null || .ci/install-debian nodejs npm
	@$(bin)/python -m tests.kubernetes.pictures.draw

.PHONY: lock
lock: ## Write the lock files anew after a change of dependencies (UPGRADE=1: newest versions)
	@.ci/lock

.PHONY: sbom
sbom: ## List what an image holds: make sbom IMAGE=killswitch-sidecar:0.1.0 (ENGINE=docker: not with podman)
	@.ci/sbom "$(IMAGE)" dist/sbom.cdx.json && echo "sbom: dist/sbom.cdx.json"

.PHONY: clean
clean: ## Remove everything that was made here, .venv too
	@rm -rf .venv .cache .coverage .coverage.* .hypothesis .mypy_cache .pytest_cache .ruff_cache .import_linter_cache build dist \
		tests/kubernetes/pictures/node_modules
	@find sidecar tests -name __pycache__ -type d -prune -exec rm -rf {} +

# --- parts of the targets above ---

.PHONY: setup
setup: .venv
	@.ci/tools

# Always asked, quick to answer: the script knows whether anything changed.
.PHONY: .venv
.venv:
	@.ci/venv

.PHONY: lint
lint: .venv
	@$(bin)/ruff check --quiet .
	@$(bin)/ruff format --check --quiet .
	@$(bin)/mypy --no-error-summary sidecar grafana
	@report=$$($(bin)/lint-imports --no-logo) || { echo "$$report"; exit 1; }
	@echo "lint: ruff, mypy and the import contracts are content"
