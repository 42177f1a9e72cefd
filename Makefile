# Two commands are all there is to know: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch>=2.11,<2.14

.PHONY: demo test test-vllm test-clients check lint format chaos clean

demo: $(VENV)/.installed
	$(BIN)/tandem demo

test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(ARGS)

# The connector for vLLM, in an environment of its own: vLLM pins torch and much else.
VLLM_ENV ?= .venv-vllm
test-vllm: $(VLLM_ENV)/.installed
	HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 VLLM_CPU_KVCACHE_SPACE=1 OMP_NUM_THREADS=1 \
		$(VLLM_ENV)/bin/python -m pytest -W default tests/vllm tests/vllm_live $(ARGS)

$(VLLM_ENV)/.installed: scripts/make_vllm_env.sh
	PYTHON=$(PYTHON) scripts/make_vllm_env.sh $(VLLM_ENV)
	touch $@

# The clients that people have, in an environment of their own; `norecursedirs` keeps its tests out of `make test`.
CLIENTS_ENV ?= .venv-clients
test-clients: $(CLIENTS_ENV)/.installed
	HF_HUB_OFFLINE=1 DO_NOT_TRACK=1 OMP_NUM_THREADS=1 $(CLIENTS_ENV)/bin/python -m pytest -W default tests/clients $(ARGS)

$(CLIENTS_ENV)/.installed: tests/clients/requirements.txt pyproject.toml
	$(PYTHON) -m venv $(CLIENTS_ENV)
	$(CLIENTS_ENV)/bin/pip install --quiet "$(TORCH)"
	$(CLIENTS_ENV)/bin/pip install --quiet --requirement tests/clients/requirements.txt
	$(CLIENTS_ENV)/bin/pip install --quiet --editable .
	touch $@

# The inner loop: all that starts no processes, in less than two minutes.
check: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --ignore tests/e2e --ignore tests/shapes --ignore tests/netns $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Kills, stops and cuts a real cluster under load, and checks every answer; fails if one is wrong, hung or leaked.
ROUNDS ?= 50
SEED ?= 1
chaos: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.chaos --rounds $(ROUNDS) --seed $(SEED) --connector both $(ARGS)

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Tandem needs Python 3.11 or newer; try make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

# torch first and by itself: its range decides which build pip takes.
$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV)
