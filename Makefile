# Two entry points: `make quickstart` and `make test`. Both set up .venv first, once. `make test-all` adds the tests marked
# slow. `make bench` needs a GPU.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= runs/quickstart

.PHONY: setup quickstart test test-all bench clean

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

# Two workers side by side, and one of them for everything that starts Ray or a vLLM engine (tests/conftest.py, ALONE_PLACES).
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder

test: setup $(VENV)/.ready-test
	$(PYTEST) -m "not slow" $(ARGS)

test-all: setup $(VENV)/.ready-test
	$(PYTEST) $(ARGS)

# On a machine with a GPU, with the Python that has vLLM, verl and this package: `make bench PYTHON=python RESULTS=somewhere`.
# With two: `python benchmarks/bench_two_gpus.py --json $(RESULTS)/two_gpus_7b.json`.
RESULTS ?= benchmarks/results
bench:
	$(PYTHON) benchmarks/bench_gemm.py --marlin --json $(RESULTS)/gemm.json
	$(PYTHON) benchmarks/bench_gemm.py --lora --json $(RESULTS)/lora_gemm.json
	$(PYTHON) benchmarks/bench_gemm.py --tune --shapes others --json $(RESULTS)/gemm_other_shapes.json
	$(PYTHON) benchmarks/bench_gemm.py --tune --lora --shapes others --json $(RESULTS)/lora_gemm_other_shapes.json
	$(PYTHON) benchmarks/bench_training.py --json $(RESULTS)/training_7b.json
	$(PYTHON) benchmarks/bench_training.py --batch 16 --length 768 --variants bf16_peft nvfp4_selective nvfp4_selective_compiled \
		--json $(RESULTS)/training_7b_12288.json
	$(PYTHON) benchmarks/bench_without_flash_attn.py --json $(RESULTS)/without_flash_attn.json
	$(PYTHON) benchmarks/bench_rollout.py --shape 7B --json $(RESULTS)/rollout_7b.json
	$(PYTHON) benchmarks/bench_rollout.py --shape 32B-32 --sequences 8 64 256 --json $(RESULTS)/rollout_32b.json
	$(PYTHON) benchmarks/bench_grpo_step.py --variants bf16_lora nvfp4_lora nvfp4_lora_not_compiled --json $(RESULTS)/grpo_step_7b.json
	$(PYTHON) benchmarks/report.py $(RESULTS)

clean:
	rm -rf $(VENV) build
