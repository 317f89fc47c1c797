# From a fresh clone, with Python 3.11+ and make: `make demo`, `make test`.
# Override: PYTHON (the interpreter that makes .venv), WORKERS (test processes), ARGS (for demo, test, bench).

VENV    := .venv
PY      := $(VENV)/bin/python
STAMP   := $(VENV)/.lora_tree-installed
WORKERS ?= 2
ARGS    ?=
# Small steps on every core: where another program wants one of them too, threads that spin make all wait.
OMP_WAIT_POLICY ?= PASSIVE
USABLE  := import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))
PYTHON  ?= $(shell for p in python3 python3.11 python3.12 python3.13 python3.14 python; do \
                       $$p -c '$(USABLE)' >/dev/null 2>&1 && { command -v $$p; break; }; done)

.DEFAULT_GOAL := help
.PHONY: help venv demo test fuzz lint bench compare clean

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## */  make \1\t/' | expand -t 16

venv: $(STAMP)  ## .venv with everything, at the versions in constraints.txt

$(PY):
	@test -n '$(PYTHON)' || { echo 'Python 3.11 or newer with venv is needed; name one: make PYTHON=…' >&2; exit 1; }
	'$(PYTHON)' -m venv $(VENV)

$(STAMP): pyproject.toml constraints.txt | $(PY)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)  ## train a small base and a tree on the standard library, switch, export, compare (under 5 minutes)
	OMP_WAIT_POLICY=$(OMP_WAIT_POLICY) $(PY) -m lora_tree.cli demo $(ARGS)

test: $(STAMP)  ## the test suite (under 10 minutes on 2 cores)
	$(PY) -m pytest -n $(WORKERS) --dist worksteal -q $(ARGS)

fuzz: $(STAMP)  ## the property tests with new random examples; run it over and over to find what they missed
	$(PY) -m pytest -n $(WORKERS) --dist worksteal -q --hypothesis-profile=fuzz \
		$$(grep -lE 'hypothesis' tests/test_*.py) $(ARGS)

lint: $(STAMP)  ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

bench: $(STAMP)  ## every benchmark at full size (several minutes on 2 cores, 8 GB)
	$(PY) -m benchmarks $(ARGS)

compare: $(STAMP)  ## does a tree pay? pooled, flat and tree adapters on the same rows (about an hour on 2 cores)
	OMP_WAIT_POLICY=$(OMP_WAIT_POLICY) $(PY) -m benchmarks.compare $(ARGS)

clean:  ## remove caches, build products and the demo's folders; .venv stays
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis demo-zoo demo-zoo-base demo-zoo-export
	find lora_tree tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
