# Every target does the set-up that it needs: a virtual environment with the versions of
# requirements.lock and this package. A second call installs nothing and needs no network.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory
.PHONY: help study test check test-cluster lab report lock badges bench bench-gpu growth scaling coverage rehearse colab-check clean

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
# Of all that pip says, the names as they come: enough to see that it goes on.
NAMES  := awk '/^Collecting/ {printf "%s ", $$2; fflush()} /^Installing/ {print "installing"}'
# Written last, so that a set-up that was stopped half-way is done again.
READY  := $(VENV)/.ready

help:  ## Say what there is to make
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1|\2/p' Makefile | while IFS='|' read -r what why; \
	  do printf '%-20s %s\n' "$$what" "$$why"; done

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	@echo "Setting up $(VENV) (once; some minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install -r requirements.lock | $(NAMES)
	@$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

study: $(READY)  ## Run the study on the model organism; the last line names its page
	@$(BIN)/healing run quick $(ARGS)

# Three processes share out whole files, those that run notebooks and studies first. The
# notebooks compute cells again, in a folder of their own: results of an earlier run would make the
# comparison compare nothing. Those of all seeds but one are found finished, for time.
test: $(READY)  ## Run all tests, the committed notebooks included (ARGS="-k name" for some)
	@$(MAKE) $(VENV)/.cluster || echo "Ray cannot be installed: tests on its cluster are skipped"
	@runs=$$(mktemp -d); trap 'rm -rf "$$runs"' EXIT; \
	$(BIN)/python tests/finished_cells.py "$$runs/quick"; \
	HEALING_RUNS="$$runs" HEALING_PROGRESS=quiet $(BIN)/python -m pytest --numprocesses=3 \
	  --dist=loadfile --no-loadscope-reorder --nbval-lax --nbval-current-env \
	  --nbval-cell-timeout=1500 --timeout=1500 notebooks tests/run tests/study tests $(ARGS)

# Ray is large and few need it: it is installed when this is first asked for.
$(VENV)/.cluster: $(READY) requirements-cluster.lock
	@$(PIP) install --constraint requirements.lock -r requirements-cluster.lock | $(NAMES)
	@touch $@

test-cluster: $(VENV)/.cluster  ## Run the tests on a Ray cluster of two nodes, all on this machine
	@HEALING_PROGRESS=quiet $(BIN)/python -m pytest tests/study/test_cluster.py $(ARGS)

lab: $(READY)  ## Open the notebooks in JupyterLab
	@$(BIN)/jupyter lab notebooks

report: $(READY)  ## Write the page of the newest run again
	@$(BIN)/healing report $(ARGS)

# NeuroX's own pins are from 2021: it gets its code alone, and this environment's libraries.
$(VENV)/.neurox: $(READY)
	@$(PYTHON) -m venv $(VENV)/neurox
	@$(VENV)/neurox/bin/python -m pip --disable-pip-version-check install --quiet --no-deps \
	  neurox==1.0.9 svgwrite imbalanced-learn h5py sklearn-compat
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])' \
	  > "$$($(VENV)/neurox/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/healing.pth"
	@touch $@

# With the memory settings that `healing run` gives its processes; the peers get them too.
bench: $(VENV)/.neurox  ## Measure training and probing against their peers; needs MiniLM and data
	@export $$($(BIN)/python -c \
	  'from healing_utils.study.pool import HUGE_PAGES as h; print(*map("=".join, h.items()))'); \
	$(BIN)/python tests/benchmarks/throughput.py $(ARGS); \
	$(BIN)/python tests/benchmarks/probing.py $(VENV)/neurox/bin/python

bench-gpu: $(READY)  ## Measure training on a GPU: MiniLM-L6, BERT-Base and BERT-Large on SST-2
	@for model in sentence-transformers/all-MiniLM-L6-v2:2e-4 bert-base-uncased:2e-5 \
	    bert-large-uncased:2e-5; do \
	  $(BIN)/python tests/benchmarks/throughput.py --model "$${model%:*}" --rate "$${model##*:}" \
	    --seeds 6 --name "gpu-$$(basename "$${model%:*}")" $(ARGS); \
	done

growth: $(READY)  ## Measure how time and memory grow, and draw it
	@$(BIN)/python tests/benchmarks/growth.py $(ARGS)

scaling: $(VENV)/.cluster  ## Measure one worker against two, as processes and on Ray
	@$(BIN)/python tests/benchmarks/scaling.py $(ARGS)

coverage: $(READY)  ## Simulate how often intervals cover and verdicts err (ARGS=--write keeps it)
	@$(BIN)/python tests/benchmarks/coverage.py $(ARGS)

rehearse: $(READY)  ## Run the paper's profile on made-up stand-ins of its models and data sets
	@at=$$(mktemp -d); $(BIN)/python tests/rehearsal.py "$$at"; echo "its page: $$at/run/index.html"

colab-check: $(READY)  ## Run a notebook the way Colab does: alone, in a fresh environment
	@HEALING_PROGRESS=quiet $(BIN)/python -m pytest -rs tests/run/test_colab.py $(ARGS)

badges:  ## Write the repository's address into README and notebooks: make badges REPO=owner/name
	@[[ "$(REPO)" =~ ^[A-Za-z0-9][A-Za-z0-9-]*/[A-Za-z0-9._-]+$$ ]] \
	  || { echo "which repository? make badges REPO=owner/name" >&2; exit 2; }
	@perl -pi -e 's{(google\.com/github|(git\+|clone )https://github\.com)/[\w-]+/[\w.-]+}{$$1/$(REPO)}g' \
	  README.md notebooks/*.ipynb

QUICK := $(addprefix tests/,test_house.py base texts organism study/test_parameters.py \
  run/test_cli.py run/test_profiles.py)
check: $(READY)  ## Check format and style, and run the quick tests
	@$(BIN)/ruff check healing_utils notebooks tests && $(BIN)/ruff format --check healing_utils tests
	@HEALING_PROGRESS=quiet $(BIN)/python -m pytest $(QUICK) $(ARGS)

# The newest versions that pyproject.toml allows, except torch: a change of torch is a download of
# gigabytes and a change of numerics, so it is made on purpose, make lock TORCH=x.y.z.
TORCH ?= $(shell sed -n 's/^torch==//p' requirements.lock)
lock:  ## Make the locks again from the ranges in pyproject.toml (Python 3.11)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' \
	  || { echo "the lock is made with Python 3.11: make lock PYTHON=python3.11" >&2; exit 1; }
	@work=$$(mktemp -d); trap 'rm -rf "$$work"' EXIT; \
	$(PYTHON) -m venv "$$work/venv"; \
	pip="$$work/venv/bin/python -m pip --disable-pip-version-check"; \
	echo "torch==$(TORCH)" > "$$work/torch"; \
	$$pip install --constraint "$$work/torch" --editable ".[lab,test,bench]" | $(NAMES); \
	pins() { $$pip freeze --all --exclude-editable \
	  | sed -E 's/\+[A-Za-z0-9.]+$$//' \
	  | { grep -viE '^(pip|wheel|triton|nvidia-[^=]*|cuda-[^=]*)==' || true; } | sort -f; }; \
	pins > "$$work/lock"; \
	$$pip install --constraint "$$work/lock" --editable ".[cluster]" | $(NAMES); \
	pins | { grep -vxFf "$$work/lock" || true; } > "$$work/cluster"; \
	cp "$$work/lock" requirements.lock; cp "$$work/cluster" requirements-cluster.lock; \
	wc -l requirements.lock requirements-cluster.lock

clean:  ## Remove the environment and all caches; runs under data/runs stay
	@rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -prune -exec rm -rf {} +
	@find . -name .ipynb_checkpoints -prune -exec rm -rf {} +
