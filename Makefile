# Two entry points: `make quickstart` and `make test`. Both set up .venv first, once.
# `make test-all` adds the tests marked slow, and `make lint` reads the sources. `make bench` needs
# a GPU.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= runs/quickstart

.PHONY: setup quickstart lint test test-all bench docs clean

setup: $(VENV)/.ready

$(VENV)/.ready: requirements/cpu.txt requirements/vllm-alias/setup.py setup.py requirements/setup.sh
	PYTHON="$(PYTHON)" bash requirements/setup.sh "$(VENV)"
	touch $@

quickstart: setup
	$(BIN)/python -m qerl_verl.quickstart --out "$(OUT)"

# --no-deps: no test may change the set that the quickstart runs with
$(VENV)/.ready-test: $(VENV)/.ready requirements/test.txt
	$(BIN)/python -m pip --disable-pip-version-check install -q --no-deps -r requirements/test.txt
	touch $@

# Reads the sources: rules, format and types.
lint: setup $(VENV)/.ready-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Two workers side by side, and one of them for everything that starts Ray or a vLLM engine
# (tests/conftest.py, ALONE_PLACES).
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder

test: setup $(VENV)/.ready-test
	$(PYTEST) -m "not slow" $(ARGS)

test-all: setup $(VENV)/.ready-test
	$(PYTEST) $(ARGS)

# Runs on a machine with a GPU, with the Python that has vLLM, verl and this package:
# `make bench PYTHON=python RESULTS=somewhere`. It takes less than an hour. Parts whose result is
# there for this code, this GPU and these versions are skipped (not with `ARGS=--force`), so a call
# after an interruption goes on, also within a part. `python benchmarks/run_all.py --list` shows the
# plan.
RESULTS ?= benchmarks/results
bench:
	$(PYTHON) benchmarks/run_all.py --results "$(RESULTS)" $(ARGS); status=$$?; \
		$(PYTHON) benchmarks/report.py "$(RESULTS)" && exit $$status

# The documentation site, in site/. `make docs MKDOCS="serve"` shows it at 127.0.0.1:8000 and
# follows changes.
DOCS_VENV ?= .venv-docs
MKDOCS ?= build --strict
$(DOCS_VENV)/.ready: requirements/docs.txt
	"$(PYTHON)" -m venv "$(DOCS_VENV)"
	$(DOCS_VENV)/bin/python -m pip --disable-pip-version-check install -q -r requirements/docs.txt
	touch $@

docs: $(DOCS_VENV)/.ready
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs $(MKDOCS)

clean:
	rm -rf $(VENV) $(DOCS_VENV) build site
