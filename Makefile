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

# --no-deps: no test may change the set that the quickstart runs with
$(VENV)/.ready-test: $(VENV)/.ready requirements/test.txt
	$(BIN)/python -m pip --disable-pip-version-check install -q --no-deps -r requirements/test.txt
	touch $@

test: setup $(VENV)/.ready-test
	$(BIN)/python -m pytest $(ARGS)

clean:
	rm -rf $(VENV) build runs
