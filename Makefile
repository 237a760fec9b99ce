# The commands of everyday work; each makes the environment in .venv first when it is missing or out of date.
# Needs make and Python 3.11 or later: `make PYTHON=python3.12 test` where python3 is an older one.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Written last, so that an environment whose making was interrupted is made anew.
STAMP := $(VENV)/.complete

# Tests run in so many processes; most of them wait for others most of the time.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

# Idle OpenMP threads sleep instead of spinning: tests start several ranks on few cores.
export OMP_WAIT_POLICY := passive

.DEFAULT_GOAL := help
.PHONY: help demo test test-long test-gpu check format clean

help:
	@echo "make demo       pre-train a small model on English, go on with German, write demo/report.html"
	@echo "make test       the quick tests"
	@echo "make test-long  the tests that take minutes or need more than Python (a browser, a cluster)"
	@echo "make test-gpu   the kernels' tests on this machine's GPU"
	@echo "make check      format, lint, types, import rules; make format puts right what it can"
	@echo "make clean      remove .venv, caches and the demo's files"

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("megacl needs Python 3.11 or later, this is " + sys.version.split()[0] + ": make PYTHON=python3.12 ...")'
	test -e $@ || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev,report,track]'
	@touch $@

demo: $(STAMP)
	$(BIN)/python tools/demo.py

test: $(STAMP)
	$(PYTEST) -m "not long"

test-long: $(STAMP)
	$(PYTEST) -m long

test-gpu: $(STAMP)
	$(BIN)/python -c 'import sys, torch; torch.cuda.is_available() or sys.exit("test-gpu: PyTorch finds no GPU here")'
	MEGACL_TEST_GPU=1 $(BIN)/python -m pytest tests/kernels tests/test_engine.py::test_batches_are_staged_in_pinned_memory_on_a_gpu

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy tools/*.py
	$(BIN)/python -m pytest tests/test_import_rules.py

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist demo
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
