# Everything needs Python 3.11 or newer with venv, make, and, for compiled speed, g++. `make demo` and `make test` share
# one environment, .venv.
PYTHON ?= python3
BIN := .venv/bin
# The public modules, and the mechanisms, whose files begin with the theory
PAGES := biofunc '!biofunc\.' $(addprefix biofunc., random ensemble schedules distributions measure plot rule fuzzy \
	volume crystallize temporal activity_rates rejuvenate lognormal dale splitting scaling activity studies.l2_init \
	studies.shrink_and_perturb statistics)

.PHONY: demo test matrix bench docs lint clean

demo: .venv/demo
	$(BIN)/python -m biofunc compare

test: .venv/test lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --cov --cov-report=term --cov-fail-under=95
	BIOFUNC_QUICK=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest --nbmake notebooks -o filterwarnings=default

matrix:
	$(PYTHON) tests/matrix.py $(ARGUMENTS)

bench: .venv/test
	$(BIN)/python tests/benchmarks/run.py

docs: .venv/docs
	rm -rf docs/api
	$(BIN)/python -m pdoc -d google -t docs/templates -o docs/api $(PAGES)

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

.venv/docs: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf .venv .matrix docs/api runs .hypothesis .mypy_cache .ruff_cache
