# make demo      the demonstration: train a small model on the built-in sounds, then use it
# make test      what a user runs: every test but the slow ones
# make test-ci   the slow tests
# make lint      ruff check and ruff format --check, and the README's figures against the records
# make soak      the reliability figures in their long forms: MINUTES=5 at most for each
# make bench     times what this machine can run beside its peers; at most 10 minutes a call
# make peers WHEELS=FOLDER   installs peers to compare with, no network needed
# make compile-report   compiles every kernel for GPUs that this machine lacks
# make figures   writes the README's figures from benchmarks/results
#
# The first one creates the virtual environment .venv with the versions of constraints.txt.
# make PY=python TARGET   uses an existing environment as it is
# make PYTHON=python3.12 TARGET   creates .venv with another interpreter (3.10 or later)

PYTHON ?= python3
MINUTES ?= 5
# Two processes of the tests, and what they start, take up to 3.5 GB.
PROCESSES := -n logical --maxprocesses 4 --dist worksteal

ifeq ($(origin PY),undefined)
PY := .venv/bin/python
ENVIRONMENT := .venv/installed
ifeq ($(OS),Windows_NT)
$(error on Windows: pip install -e .[dev], then make PY=python; or use WSL)
endif
else
ENVIRONMENT := is-installed
endif

.PHONY: help demo test test-ci soak lint bench peers compile-report figures is-installed

help:
	@sed -n '/^$$/q; s/^# //p' Makefile

demo: $(ENVIRONMENT)
	$(PY) -m slap_fast.cli demo

test: $(ENVIRONMENT)
	$(PY) -m pytest -m "not slow" $(PROCESSES)

# pytest exits with 5 where no test is marked slow.
test-ci: $(ENVIRONMENT)
	$(PY) -m pytest -m slow $(PROCESSES) || [ $$? -eq 5 ]

soak: $(ENVIRONMENT)
	$(PY) -m pytest --soak --soak-minutes $(MINUTES)

lint: $(ENVIRONMENT)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m benchmarks.report.readme --check

bench: $(ENVIRONMENT)
	$(PY) -m benchmarks.suite $(BENCH)

# Also installs what is missing before slap-fast itself can be.
peers: $(filter .venv/installed,$(ENVIRONMENT))
	$(PY) -m benchmarks.suite --again --wheels $(WHEELS) peers

compile-report: $(ENVIRONMENT)
	$(PY) -m benchmarks.report.compile_report --out benchmarks/results/compile_report.json

figures: $(ENVIRONMENT)
	$(PY) -m benchmarks.report.readme

# torch first and alone: it decides which build the rest has to fit.
.venv/installed: pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo 'needs Python 3.10 or later: make PYTHON=python3.12, say' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
		{ echo 'install python3-venv, or use your own environment: make PY=python' >&2; exit 1; }
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -c constraints.txt torch
	.venv/bin/python -m pip install -c constraints.txt -e '.[dev]'
	touch $@

# The empty first entry of sys.path would find the metadata that a build leaves in this folder.
is-installed:
	@$(PY) -c 'import sys; sys.path.remove(""); from importlib.metadata import version; \
		version("slap-fast")' 2>/dev/null || \
		{ echo 'slap-fast is not installed there: $(PY) -m pip install -e ".[dev]"' >&2; exit 1; }
