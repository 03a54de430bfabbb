# Everything needs Python 3.11 or newer with venv, make, and, for compiled speed, g++. `make demo` and `make test` share
# one environment, .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test bench lint clean

demo: .venv/demo
	$(BIN)/python -m biofunc compare

test: .venv/test lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --cov --cov-report=term --cov-fail-under=95
	OMP_NUM_THREADS=1 BIOFUNC_QUICK=1 $(BIN)/python -m pytest --nbmake notebooks -o filterwarnings=default

bench: .venv/test
	$(BIN)/python tests/benchmarks/run.py

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/mypy

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/demo: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[demo]'
	@touch $@

.venv/test: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[test]'
	@touch $@ .venv/demo

clean:
	rm -rf .venv runs .hypothesis .mypy_cache .ruff_cache
