# Everything a developer or CI runs. `make help` lists it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# torch is installed first and pinned: whatever asks for it later finds it there. On Linux the default package index
# has a build with CUDA; point PIP_EXTRA_INDEX_URL at PyTorch's CPU index for a smaller one.
TORCH ?= torch==2.13.0

.DEFAULT_GOAL := help
.PHONY: help venv dev run test test-long check fix protos clean bench-exact bench-start bench-abort bench-engine bench-attention bench-kvpool bench-faults bench-swap bench-router bench-vs-vllm bench-predictor bench-policies bench-fidelity bench-adversaries bench-simulator own-answers gpu-check

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=24.1'

$(VENV)/.serve: $(BIN)/python pyproject.toml
	@echo 'Setting up $(VENV), one or two minutes ...'
	$(BIN)/python -m pip install --progress-bar on '$(TORCH)'
	$(BIN)/python -m pip install --quiet --editable '.[serve]'
	@touch $@

$(VENV)/.dev: $(VENV)/.serve
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

venv: $(VENV)/.serve ## Set up .venv with everything that serving needs

dev: $(VENV)/.dev ## Set up .venv for development too

run: $(VENV)/.serve ## Get the default model, start a mesh, ask it something, serve until Ctrl-C
	@$(BIN)/muxmesh up --hello

test: $(VENV)/.dev ## Run all tests
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-long: $(VENV)/.dev ## Run the property tests with many more examples
	HYPOTHESIS_PROFILE=long $(BIN)/python -m pytest tests/kvstore tests/router $(PYTEST_ARGS)

check: $(VENV)/.dev ## Lint, types, import rules, protos, generated code
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	cd protos && ../$(BIN)/buf lint
	$(BIN)/python scripts/gen_protos.py --check

fix: $(VENV)/.dev ## Format, and mend what the linter can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

protos: $(VENV)/.dev ## Generate the code of protos/
	$(BIN)/python scripts/gen_protos.py

bench-exact: $(VENV)/.dev ## 50 chat prompts x 32 tokens through the mesh, against transformers
	$(BIN)/python -m benchmarks.exact

bench-start: $(VENV)/.dev ## Start-up time, memory of the weights, idle CPU
	$(BIN)/python -m benchmarks.start

bench-abort: $(VENV)/.dev ## Cancels, deadlines, killed clients and workers on the real model
	$(BIN)/python -m benchmarks.abort

bench-engine: $(VENV)/.dev ## The engine alone, beside vLLM's if VLLM_PYTHON names an interpreter that has it
	VLLM_PYTHON=$(VLLM_PYTHON) $(BIN)/python -m benchmarks.engine

bench-swap: $(VENV)/.dev ## The swap tier: size, speed, quality over DATA, a jsonl of {prompt, output} such as GSM8K
	$(BIN)/python -m benchmarks.swap $(DATA)

bench-router: $(VENV)/.dev ## The control plane alone: time in the router, CPU for each relayed message
	$(BIN)/python -m benchmarks.router

bench-vs-vllm: $(VENV)/.dev ## Beside vLLM's server (VLLM_PYTHON), the same load; DATA: jsonl files of prompts; PD=--pd for its pair too
	VLLM_PYTHON=$(VLLM_PYTHON) $(BIN)/python -m benchmarks.vs_vllm $(DATA) $(PD)

bench-attention: $(VENV)/.dev ## The attention kernel alone, beside the read bandwidth
	$(BIN)/python -m benchmarks.attention

bench-kvpool: $(VENV)/.dev ## The KV pool: speed, use, hand-off, prefix hits, metadata
	$(BIN)/python -m benchmarks.kvpool

bench-faults: $(VENV)/.dev ## Workers killed at random moments under load
	$(BIN)/python -m benchmarks.faults

bench-predictor: $(VENV)/.dev ## The length predictor over DATA, a folder of public answers; OWN: a jsonl from own-answers
	$(BIN)/python -m benchmarks.predictor $(DATA) $(if $(OWN),--own $(OWN))

own-answers: $(VENV)/.dev ## The served model's own answer lengths to the prompts of DATA (jsonl files), into OWN
	$(BIN)/python -m benchmarks.own_answers $(OWN) $(DATA)

bench-policies: $(VENV)/.dev ## Orders against each other in virtual time, over DATA, a folder of public answers
	$(BIN)/python -m benchmarks.policies $(DATA)

bench-fidelity: $(VENV)/.dev ## The simulator beside a real mesh of sim engines
	$(BIN)/python -m benchmarks.fidelity

bench-adversaries: $(VENV)/.dev ## Predictors of no use in a router of a real mesh, beside HRRN
	$(BIN)/python -m benchmarks.adversaries

bench-simulator: $(VENV)/.dev ## A million simulated requests on one core
	$(BIN)/python -m benchmarks.million

gpu-check: $(VENV)/.dev ## The tests that need a GPU
	$(BIN)/python -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "torch sees no GPU here")'
	$(BIN)/python -m pytest -q -k cuda tests/muxmesh/engine/torch_engine/test_plain.py

clean: ## Remove what was built
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache *.egg-info
