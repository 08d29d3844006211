# make demo: train, evaluate and try a small model.  make test: the default test suite, in WORKERS processes of about
# 2 GB.  Both build .venv first.
PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin

.PHONY: demo test lint types clean

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Sid needs Python 3.11 or newer")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: .venv/ready
	$(BIN)/sid demo

test: .venv/ready
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

lint: .venv/ready
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: .venv/ready
	$(BIN)/pyright

clean:
	rm -rf .venv build src/*.egg-info
