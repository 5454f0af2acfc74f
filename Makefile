# Everything a developer or CI runs. `make help` lists it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Development needs torch for the reference that engines are compared with, and for the GPU path, whose kernels Triton
# interprets in tests. It is installed first and pinned: what asks for it later finds it there. On Linux the default
# package index has a build with CUDA; point PIP_EXTRA_INDEX_URL at PyTorch's CPU index for a smaller one.
TORCH ?= torch==2.13.0
# For `make test-py312`: the oldest releases that the GPU path supports. This Triton's interpreter needs numpy < 2.4.
PYTHON312 ?= python3.12
VENV312 ?= .venv-py312
OLDEST := 'torch==2.11.0' 'triton==3.6.0' 'numpy<2.4'
GPU_TESTS := tests/muxmesh/cuda tests/muxmesh/device tests/muxmesh/engine/native/cuda tests/muxmesh/engine/test_*.py \
	tests/muxmesh/models/test_*weight*.py tests/worker/test_*cuda*.py tests/worker/test_device_weights.py
# For the targets that run on a machine with a GPU.
GPU_PYTHON ?= python3
GPU_SITE := $(CURDIR)/build/gpu-site
# For `make chaos`.
SECONDS ?= 60
SEED ?= 1

.DEFAULT_GOAL := help
.PHONY: help venv dev run test test-py312 test-long test-clients compose-up compose-down compose-engine compose-test check check-code check-compose fix protos chaos clean bench-exact bench-start bench-abort bench-stopped bench-engine bench-attention bench-profile bench-kvpool bench-arbiter bench-shares bench-swap bench-preemption-modes bench-swap-cost bench-pressure bench-residency bench-router bench-tenant-quotas bench-overload bench-tenancy-overhead bench-hostile bench-vs-vllm bench-predictor bench-policies bench-muxserve bench-muxserve-measured bench-muxserve-scale bench-floods bench-fidelity bench-adversaries bench-fairness bench-fairness-mesh bench-simulator bench-before-after own-outputs gpu-wheels gpu-check bench-gpu bench-many-models bench-plans bench-alise bench-alise-virtual

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=24.1'

$(VENV)/.serve: $(BIN)/python pyproject.toml
	@echo 'Setting up $(VENV), about a minute ...'
	$(BIN)/python -m pip install --quiet --editable '.[serve]'
	@touch $@

$(VENV)/.dev: $(VENV)/.serve
	$(BIN)/python -m pip install --progress-bar on '$(TORCH)'
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

venv: $(VENV)/.serve ## Set up .venv with everything that serving needs

dev: $(VENV)/.dev ## Set up .venv for development too

run: $(VENV)/.serve ## Download the default model, start a mesh, send it a prompt, serve until Ctrl-C
	@$(BIN)/muxmesh up --hello

# Files of tests run two at a time, those of compose/ one after another: they share a Docker engine.
test: $(VENV)/.dev ## Run all tests but the long ones
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --ignore tests/compose $(PYTEST_ARGS)
	$(BIN)/python -m pytest tests/compose $(PYTEST_ARGS)

$(VENV312)/.dev: pyproject.toml
	$(PYTHON312) -c 'import sys; sys.exit(None if sys.version_info[:2] == (3, 12) else "Python 3.12 is needed, this is " + sys.version.split()[0])'
	$(PYTHON312) -m venv $(VENV312)
	$(VENV312)/bin/python -m pip install --progress-bar on $(OLDEST)
	$(VENV312)/bin/python -m pip install --quiet --editable '.[dev]' $(OLDEST)
	@touch $@

test-py312: $(VENV312)/.dev ## The tests of engines and the GPU path with Python 3.12, torch 2.11 and Triton 3.6
	$(VENV312)/bin/python -m pytest -W 'ignore:Conversion of an array with ndim:DeprecationWarning' $(GPU_TESTS) $(PYTEST_ARGS)

test-long: $(VENV)/.dev ## Run the long tests, the property tests with many more examples, and the fuzz tests with 200,000 inputs
	$(BIN)/python -m pytest -m long $(PYTEST_ARGS)
	HYPOTHESIS_PROFILE=long $(BIN)/python -m pytest tests/kvstore tests/router $(PYTEST_ARGS)
	FUZZ_INPUTS=200000 $(BIN)/python -m pytest --timeout 3600 tests/fuzz $(PYTEST_ARGS)

chaos: $(VENV)/.dev ## Random faults under load on tiny real models (GPU=1: on a fake GPU), for SECONDS, from SEED: nothing lost, altered or leaked
	$(BIN)/python -m benchmarks.chaos --seconds $(SECONDS) --seed $(SEED) $(if $(GPU),--gpu)

test-clients: $(VENV)/.dev ## Clients in other languages and libraries against a mesh; needs node, or ARGS=--without-node
	$(BIN)/python -m tests.clients.run $(ARGS)

check: check-code check-compose ## Lint, types, import rules, protos, generated code, files of compose/ and deploy/

check-code: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	cd protos && ../$(BIN)/buf lint
	$(BIN)/python scripts/gen_protos.py --check

check-compose: $(VENV)/.dev
	$(BIN)/python scripts/check_compose.py

compose-up: ## Build the images and start the stack of compose/ with the Docker engine of this machine, until all of it serves
	cd compose && docker compose up -d --build --wait
	@echo 'muxmesh ready on 127.0.0.1:50051; logs: cd compose && docker compose logs -f'

compose-down: ## Stop the stack of compose/ and remove its containers, network and volumes
	cd compose && docker compose --profile '*' down --volumes --remove-orphans

# As root, with the packages runc, iptables, slirp4netns and mmdebstrap. Nothing is installed or started on the machine.
compose-engine: $(VENV)/.dev ## Fetch a Docker engine for tests into build/docker-engine, from the registries of Debian and Python
	$(BIN)/python -m tests.compose.engine_parts

compose-test: compose-engine ## The tests of compose/, in a Docker engine of their own; as root
	$(BIN)/python -m pytest -s tests/compose $(PYTEST_ARGS)

fix: $(VENV)/.dev ## Format, and fix what the linter can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

protos: $(VENV)/.dev ## Generate the code of protos/
	$(BIN)/python scripts/gen_protos.py

bench-exact: $(VENV)/.dev ## 50 chat prompts x 32 tokens through the mesh, compared with transformers
	$(BIN)/python -m benchmarks.exact

bench-start: $(VENV)/.dev ## Start-up time, memory of the weights, idle CPU
	$(BIN)/python -m benchmarks.start

bench-abort: $(VENV)/.dev ## Cancels, deadlines, killed clients and workers on the real model
	$(BIN)/python -m benchmarks.abort

bench-stopped: $(VENV)/.dev ## Every kind of process stopped by a signal under 20 streams
	$(BIN)/python -m benchmarks.stopped

bench-engine: $(VENV)/.dev ## The engine alone; with vLLM's too if VLLM_PYTHON names an interpreter that has it
	VLLM_PYTHON=$(VLLM_PYTHON) $(BIN)/python -m benchmarks.engine

bench-profile: $(VENV)/.dev ## A quick profile of the default model, and how well it predicts steps between its cells
	$(BIN)/python -m benchmarks.profile_fidelity

bench-swap: $(VENV)/.dev ## The swap space: size, speed, quality over DATA, a jsonl of {prompt, output} such as GSM8K
	$(BIN)/python -m benchmarks.swap $(DATA)

bench-swap-cost: $(VENV)/.dev ## Swap against recompute by context, here and by the cost model on GPUs: table and plot; ARGS, such as --plot FILE
	$(BIN)/python -m benchmarks.swap_cost $(ARGS)

bench-pressure: $(VENV)/.dev ## 48 chats with a tenth of the KV memory that they need: tokens, swaps, recomputes, throughput
	$(BIN)/python -m benchmarks.pressure

bench-preemption-modes: $(VENV)/.dev ## In virtual time: KV of pre-empted sequences kept, swapped, computed again, or chosen by cost; DATA: csv of prompt and output lengths
	$(BIN)/python -m benchmarks.preemption_modes $(DATA) $(ARGS)

bench-residency: $(VENV)/.dev ## The choice of a unit by prefix-cache residency in virtual time, compared with round-robin, affinity, an oracle; DATA: Mooncake's traces; ARGS, such as --loads 0.4
	$(BIN)/python -m benchmarks.residency $(DATA) $(ARGS)

bench-router: $(VENV)/.dev ## The control plane alone: time in the router, CPU per relayed message
	$(BIN)/python -m benchmarks.router

bench-tenant-quotas: $(VENV)/.dev ## Quotas over four routers: one Redis, a Cluster of three, a failover of Sentinel
	$(BIN)/python -m benchmarks.tenant_quotas

bench-overload: $(VENV)/.dev ## 1.2 and 3 times the load that a mesh can serve, for two minutes each
	$(BIN)/python -m benchmarks.overload

bench-tenancy-overhead: $(VENV)/.dev ## Time and CPU in the router with API keys, quotas and fairness, beside a mesh without
	$(BIN)/python -m benchmarks.tenancy_overhead

bench-vs-vllm: $(VENV)/.dev ## Compared with vLLM's server (VLLM_PYTHON) under one load; DATA: jsonl files of prompts; PD=--pd adds its prefill-decode pair
	VLLM_PYTHON=$(VLLM_PYTHON) $(BIN)/python -m benchmarks.vs_vllm $(DATA) $(PD)

bench-alise: $(VENV)/.dev ## What predictions and pre-emption gain over FCFS at equal latency, real outputs; DATA: jsonl files of prompts; beside vLLM with VLLM_PYTHON; ARGS, such as --minutes 1.5 or --within 40
	VLLM_PYTHON=$(VLLM_PYTHON) $(BIN)/python -m benchmarks.alise $(DATA) $(ARGS)

bench-alise-virtual: $(VENV)/.dev ## ALISE's own setting and the share of each part in virtual time; DATA: a folder of public outputs; ARGS, such as --only Alpaca
	$(BIN)/python -m benchmarks.alise_virtual $(DATA) $(ARGS)

bench-hostile: $(VENV)/.dev ## A small request beside hostile clients, and the router's memory; ATTACK: only those whose name contains it
	$(BIN)/python -m benchmarks.hostile $(ATTACK)

bench-attention: $(VENV)/.dev ## The attention kernel alone, compared with the read bandwidth
	$(BIN)/python -m benchmarks.attention

bench-kvpool: $(VENV)/.dev ## The KV pool: speed, utilization, hand-off, prefix hits, metadata
	$(BIN)/python -m benchmarks.kvpool

bench-arbiter: $(VENV)/.dev ## Cost of a round of the arbiter with 2, 6 and 40 workers, while every core computes
	$(BIN)/python -m benchmarks.arbiter

bench-shares: $(VENV)/.dev ## CPU time of workers of the default model against their compute_share
	$(BIN)/python -m benchmarks.shares

bench-predictor: $(VENV)/.dev ## The length predictor over DATA, a folder of public outputs; OWN: a jsonl from own-outputs
	$(BIN)/python -m benchmarks.predictor $(DATA) $(if $(OWN),--own $(OWN))

own-outputs: $(VENV)/.dev ## Output lengths of the served model for the prompts of DATA (jsonl files), into OWN
	$(BIN)/python -m benchmarks.own_outputs $(OWN) $(DATA)

bench-plans: $(VENV)/.dev ## Placement: MuxServe's published plans beside ours, and large searches; DATA: a folder with its profile; ARGS: other inputs
	$(BIN)/python -m benchmarks.plans $(DATA) $(ARGS)

bench-policies: $(VENV)/.dev ## Scheduling policies compared in virtual time, over DATA, a folder of public outputs
	$(BIN)/python -m benchmarks.policies $(DATA)

bench-many-models: $(VENV)/.dev ## 20 small models with 3 awake, and SmolLM2: wake times, memory, idle CPU; ARGS, such as --models 6 --skip-large
	$(BIN)/python -m benchmarks.many_models $(ARGS)

bench-muxserve: $(VENV)/.dev ## Several models on two cores, shared (adbs, temporal) or apart; DATA: jsonl files of prompts; beside vLLM with VLLM_PYTHON; ARGS, such as --quick or --cases all
	VLLM_PYTHON=$(VLLM_PYTHON) $(BIN)/python -m benchmarks.shared_device $(DATA) $(ARGS)

bench-muxserve-measured: $(VENV)/.dev ## The simulator compared with MuxServe's runs on 32 A100s; DATA: folder of its files; FILES: other measured runs; ARGS, such as --fit
	$(BIN)/python -m benchmarks.muxserve measured $(or $(FILES),$(DATA)/muxserve_synthetic_alpha1.3_measured.json.gz $(DATA)/muxserve_chatlmsys_800_measured.json) --profile $(DATA)/muxserve_profile_llama.json.gz --lengths $(DATA)/sharegpt_lengths.csv.gz $(ARGS)

bench-muxserve-scale: $(VENV)/.dev ## In virtual time at the size of MuxServe's evaluation: ours, spatial, temporal, ablations; DATA: folder of its files; QUICK=1
	$(BIN)/python -m benchmarks.muxserve scale $(DATA) $(if $(QUICK),--quick) $(ARGS)

bench-floods: $(VENV)/.dev ## One model flooded, popularity swapped, a worker that hangs or dies in its grant: what the others keep; ARGS, such as --native
	$(BIN)/python -m benchmarks.shared_device.floods $(ARGS)

bench-fidelity: $(VENV)/.dev ## The simulator compared with a real mesh of sim engines
	$(BIN)/python -m benchmarks.fidelity

bench-fairness: $(VENV)/.dev ## Service of tenants in virtual time with fairness on and off: Jain index, distance, start of a small request
	$(BIN)/python -m benchmarks.fairness

bench-fairness-mesh: $(VENV)/.dev ## The same on a real mesh with two routers, a minute for each load
	$(BIN)/python -m benchmarks.fairness_mesh $(ARGS)

bench-adversaries: $(VENV)/.dev ## Useless and hostile predictors in a real mesh, compared with HRRN
	$(BIN)/python -m benchmarks.adversaries

bench-simulator: $(VENV)/.dev ## A million simulated requests on one core; COUNT: fewer
	$(BIN)/python -m benchmarks.million $(COUNT)

bench-before-after: $(VENV)/.dev ## Benchmark BENCH (router, kvpool, ...) in the checkout BEFORE and in this one, by turns
	$(BIN)/python -m benchmarks.before_after $(BENCH) $(BEFORE) $(ROUNDS)

gpu-wheels: $(VENV)/.dev ## Collect in .whl what a machine with a GPU lacks; PIP_LIST: its `pip list`, in a file
	$(BIN)/python scripts/gpu_wheels.py $(PIP_LIST)

# A machine with a GPU has torch for CUDA in GPU_PYTHON, and .whl instead of a package index.
$(GPU_SITE): $(wildcard .whl/*.whl)
	@rm -rf $@ && mkdir -p $@
	@if ls .whl/*.whl >/dev/null 2>&1; then $(GPU_PYTHON) scripts/gpu_wheels.py --install $@; fi

gpu-check: $(GPU_SITE) ## On a machine with a GPU: every check of the GPU path, at most 10 minutes; ARGS, such as --only NAMES
	PYTHONPATH=$(GPU_SITE):$(CURDIR) $(GPU_PYTHON) -m benchmarks.gpu_check $(ARGS)

bench-gpu: $(GPU_SITE) ## On a machine with a GPU: decode, prefill, hand-off and three models; ARGS, such as --quick
	PYTHONPATH=$(GPU_SITE):$(CURDIR) $(GPU_PYTHON) -m benchmarks.gpu $(ARGS)

clean: ## Remove what was built
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache *.egg-info
