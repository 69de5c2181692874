# setup serve test check bench bench-peers bench-gateway bench-blueprint bench-cpu clean; CONTRIBUTING.md says more.
#
#   make serve                          the demo model on 127.0.0.1:8000
#   make serve MODEL=Qwen/Qwen3-0.6B ARGS="--port 9000"
#   make test ARGS="-k scheduler"       ARGS go to pytest
#   make bench-blueprint ARGS="--docs none"   ARGS go to each of its scripts

SHELL := /bin/bash
MODEL ?= demo
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin

ifndef PYTHON
PYTHON := $(shell for candidate in python3 python3.13 python3.12 python3.11; do \
    $$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
    && echo $$candidate && break; done)
endif

RUST_SOURCES := Cargo.toml Cargo.lock $(shell find crates proto -type f \
    \( -name '*.rs' -o -name 'Cargo.toml' -o -name '*.proto' \) 2>/dev/null)

.PHONY: setup serve test check bench bench-peers bench-gateway bench-blueprint bench-cpu docs clean
.DELETE_ON_ERROR:

setup: $(VENV)/.built

serve: setup
	@exec $(BIN)/scalellm serve $(MODEL) $(ARGS)

test: setup
	@$(BIN)/python tests/run_all.py $(ARGS)

check: setup
	@$(BIN)/python tests/check_all.py

bench: setup
	@$(BIN)/python benchmarks/run.py $(ARGS)

bench-peers: setup
	@$(BIN)/python benchmarks/bench_peers.py $(ARGS)

bench-gateway: setup
	@$(BIN)/python benchmarks/bench_gateway.py $(ARGS)

bench-blueprint: setup
	@missed=0; $(BIN)/python benchmarks/bench_switching.py $(ARGS) || missed=1; \
	    for script in simulator blueprint endurance; do \
	    $(BIN)/python benchmarks/bench_$$script.py || missed=1; done; exit $$missed

bench-cpu: setup
	@$(BIN)/python benchmarks/bench_cpu.py $(ARGS)

docs: setup
	@$(BIN)/scalellm config docs > docs/settings.md

clean:
	rm -rf $(VENV) target dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find python tests -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -f python/scalellm/_core*.so

# ---------------------------------------------------------------- the environment

$(VENV)/.python:
	@test -n "$(PYTHON)" || { echo "make: needs Python 3.11 or newer; PYTHON=/path/to/python chooses one" >&2; exit 1; }
	@command -v cargo >/dev/null || { echo "make: needs a Rust toolchain (cargo), 1.89 or newer: https://rustup.rs" >&2; exit 1; }
	@command -v cc >/dev/null || { echo "make: needs a C compiler (cc), e.g. the package gcc" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@touch $@

# A stamp bears the time at which its work began, so that what changes meanwhile is not missed.
# maturin comes first and pinned; the project is then built without an environment of its own.
$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/.python
	@touch $(VENV)/.began
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt maturin
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip install --quiet --disable-pip-version-check \
	    -c constraints.txt --no-build-isolation -e '.[dev]'
	@mv $(VENV)/.began $@ && cp -p $@ $(VENV)/.built

$(VENV)/.built: $(VENV)/.installed $(RUST_SOURCES)
	@test -e $@ -a -z "$$(find Cargo.toml Cargo.lock crates proto -type f -newer $@)" \
	    || { touch $(VENV)/.began && echo "building the Rust half" \
	    && $(BIN)/maturin develop --release --skip-install --quiet && mv $(VENV)/.began $@; }
