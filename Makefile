# Everything a newcomer needs: make demo, make test. `make help` lists the rest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := demo
GPUS := $(shell nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU ')
# Two tests at a time: most wait for processes to start or to talk, and two cores do both.
# tests/conftest.py has the order.
SIDE_BY_SIDE ?= -n 2 --dist loadfile --no-loadscope-reorder
# What `make check` tests: the architecture, rules of runs and of JSONs, schedules, configurations.
CHECKS := tests/architecture tests/pretrain/schedules $(wildcard tests/pretrain/test_*rules.py) \
    $(addprefix tests/pretrain/test_,config_io.py ds_config.py optim.py run_files.py) \
    $(addprefix tests/model_providers/test_,config.py layout.py options.py partition.py presets.py) \
    tests/data_tools/test_config.py tests/parity/test_covering.py tests/test_changed.py tests/test_traps.py
SINCE ?= HEAD
RANKS ?= $(if $(filter-out 0,$(GPUS)),$(GPUS),2)

# Runs and tests start many processes: without this, each compiles our sources again.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help install demo demo-corpus demo-moe demo-bert demo-t5 test test-all test-changed check format bench clean
.DEFAULT_GOAL := help
.NOTPARALLEL:  # two goals may want one environment

help:  ## this list
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 16

install: $(VENV)/.installed  ## the environment alone

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Megaloom needs Python 3.11 or newer: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $(VENV)/.installed $@

demo-corpus: $(VENV)/.installed
	$(BIN)/megaloom tokenizer stdlib --vocab-size 1024 --out $(DEMO)/tokenizer.json
	$(BIN)/megaloom prepare stdlib --tokenizer $(DEMO)/tokenizer.json --out $(DEMO)/stdlib

demo: demo-corpus  ## from Python's standard library to a trained GPT, in minutes
	@rm -rf $(DEMO)/gpt
	$(BIN)/megaloom run pretrain/runs/demo.yaml --ranks $(RANKS)
	@echo; echo "The loss curve:"; $(BIN)/megaloom plot loss $(DEMO)/gpt
	@echo; echo "The model continues 'def ':"; $(BIN)/megaloom generate $(DEMO)/gpt --prompt 'def ' --tokens 80
	@echo; echo "TensorBoard's logs are in $(DEMO)/gpt/tensorboard; look at them with"
	@echo "    $(BIN)/tensorboard --logdir $(DEMO)/gpt/tensorboard"

demo-moe: $(VENV)/.installed  ## the same with experts, shared out over two ranks
	@test -f $(DEMO)/stdlib.bin || $(MAKE) --no-print-directory demo-corpus
	@rm -rf $(DEMO)/moe
	$(BIN)/megaloom run pretrain/runs/demo-moe.yaml --ranks $(RANKS) layout.ep=$(RANKS)
	@echo; echo "The loss curve:"; $(BIN)/megaloom plot loss $(DEMO)/moe
	@echo; echo "How many tokens each expert took, in shares of a fair one:"; $(BIN)/megaloom plot experts $(DEMO)/moe
	@echo; echo "The model continues 'def ':"; $(BIN)/megaloom generate $(DEMO)/moe --prompt 'def ' --tokens 80

demo-bert: $(VENV)/.installed  ## an encoder that fills in masked words
	@test -f $(DEMO)/stdlib.bin || $(MAKE) --no-print-directory demo-corpus
	@rm -rf $(DEMO)/bert
	$(BIN)/megaloom run pretrain/runs/demo-bert.yaml --ranks $(RANKS)
	@echo; echo "The loss curve:"; $(BIN)/megaloom plot loss $(DEMO)/bert
	@echo; echo "What it puts in place of [MASK]:"
	$(BIN)/megaloom fill $(DEMO)/bert --text 'for i[MASK] range(10):' --text 'if x is not[MASK]:' --text 'def __init__([MASK], name):'

demo-t5: $(VENV)/.installed  ## an encoder and a decoder that fills in spans
	@test -f $(DEMO)/stdlib.bin || $(MAKE) --no-print-directory demo-corpus
	@rm -rf $(DEMO)/t5
	$(BIN)/megaloom run pretrain/runs/demo-t5.yaml --ranks $(RANKS)
	@echo; echo "The loss curve:"; $(BIN)/megaloom plot loss $(DEMO)/t5
	@echo; echo "What it puts in place of [MASK]:"
	$(BIN)/megaloom fill $(DEMO)/t5 --text 'for i[MASK] range(10):' --text 'if x is[MASK]:' --text 'def __init__[MASK], name):'

test: $(VENV)/.installed-dev  ## everything that CI runs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -m 'not thorough' $(SIDE_BY_SIDE)

test-all: $(VENV)/.installed-dev  ## the same, and the full product of features in place of pairs
	$(BIN)/python -m pytest $(SIDE_BY_SIDE)

test-changed: $(VENV)/.installed-dev  ## of `make test`, what the files changed since SINCE can break, the nearest first
	@files=$$($(BIN)/python -m tests.changed --since $(SINCE)); \
	if [ -n "$$files" ]; then $(BIN)/python -m pytest -m 'not thorough' $(SIDE_BY_SIDE) $$files; \
	else echo "no test depends on what changed since $(SINCE)"; fi

check: $(VENV)/.installed-dev  ## in a minute: format, lint, types, imports, rules, schedules; no ranks
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -m 'not ranks and not thorough' $(SIDE_BY_SIDE) $(CHECKS)

format: $(VENV)/.installed-dev  ## put the code into shape
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.installed-dev  ## the published figures, measured here
	$(BIN)/python -m benchmarks.throughput
	$(BIN)/python -m benchmarks.data

clean:  ## remove what the demo and the tests made
	rm -rf $(DEMO) runs_out .mypy_cache .ruff_cache .hypothesis
