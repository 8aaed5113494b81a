# Two entry points: `make quickstart` and `make test`. Both set up .venv first, once.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= runs/quickstart

.PHONY: setup quickstart test bench clean

setup: $(VENV)/.ready

$(VENV)/.ready: requirements/cpu.txt requirements/vllm-alias/setup.py setup.py requirements/setup.sh
	PYTHON="$(PYTHON)" bash requirements/setup.sh "$(VENV)"
	touch $@

quickstart: setup
	$(BIN)/python -m qerl_verl.quickstart --out "$(OUT)"

test: setup
	$(BIN)/python -m pytest $(ARGS)

clean:
	rm -rf $(VENV) build runs
