# Everything a checkout needs, from a bare machine: `make demo`, `make test`. Run `make` for the list.
#
# All that is installed or compiled lies in .venv; nothing outside the checkout is written, nothing but Python (3.11 to 3.13, with
# venv) and a C++ compiler is expected of the machine. A second call finds the stamp of the first and starts at once.

SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
.DEFAULT_GOAL := help
.SUFFIXES:
MAKEFLAGS += --no-builtin-rules

VENV := .venv
BIN := $(VENV)/bin
LOG := $(VENV)/setup.log

EXTRAS := demo-build,weights,export,lora,serve,wandb,mlflow,trackio,test,lint,bench,docs
NUM_GPUS := $(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU ')
NUM_TESTERS := $(shell cores=$$(nproc); echo $$((cores < 8 ? cores + 1 : 8)))
NUM_RANKS := $(if $(filter 1,$(NUM_GPUS)),1,2)

# Done once for each content of these files: a newer checkout installs again, a touched file does not.
STAMP := $(VENV)/installed-$(shell cat pyproject.toml constraints.txt tools/warm_up_deepspeed.py | sha256sum | cut -c1-12)

# The tools' own folder first, so that DeepSpeed finds the `ninja` it was compiled with (another one makes it compile again),
# and what it compiles stays in the checkout.
export PATH := $(CURDIR)/$(BIN):$(PATH)
export TORCH_EXTENSIONS_DIR := $(CURDIR)/$(VENV)/torch_extensions
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup demo test ci soak lint format docs bench gpu-check gpu-wheels clean distclean

help: ## show this list
	@echo "dist_proxygml: make TARGET"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## install everything into .venv (the other targets do it by themselves)

demo: $(STAMP) ## train on the embedded images with DeepSpeed workers, evaluate, write a report
	@$(BIN)/deepspeed --log_level warning --num_gpus $(NUM_RANKS) launchers/train.py --config configs/demo_cpu.json --resume never

# Files are spread over processes, those that take longest first; what times signals and steps has the machine for itself.
TESTS := tests/integration tests/distributed tests/parity tests/unit
TESTS_ALONE := $(addprefix tests/integration/test_,kills.py slurm.py sweep.py)
test: PYTEST := $(BIN)/python -m pytest -m 'not ci'
test: ## run all tests but the longest (8 minutes on two cores)
ci: PYTEST := $(BIN)/python -m pytest -m ci
ci: ## run the longest tests, which make test leaves out (13 minutes on two cores)
test ci: $(STAMP)
	@status=0; \
	$(PYTEST) -n $(NUM_TESTERS) --dist loadfile --no-loadscope-reorder $(TESTS) $(TESTS_ALONE:%=--ignore=%) || status=$$?; \
	if [ $$status -eq 2 ]; then exit 2; fi; \
	$(PYTEST) $(TESTS_ALONE) tests/gpu || status=$$?; \
	if [ $$status -ne 0 ]; then echo "make $@: tests failed, see above"; fi; \
	exit $$status

soak: $(STAMP) ## kill a training run at every point and 60 times at random, and compare (5 minutes)
	@$(BIN)/python -m tests.soak --sweep
	@$(BIN)/python -m tests.soak

lint: $(STAMP) ## check style (ruff) and types (mypy)
	@$(BIN)/ruff check --output-format concise .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(STAMP) ## let ruff rewrite what it can
	@$(BIN)/ruff check --fix --quiet . ; $(BIN)/ruff format .

docs: $(STAMP) ## build the documentation as a site, build/site/index.html
	@$(BIN)/zensical build --strict && echo "build/site/index.html"

bench: $(STAMP) ## time the loss, up to ten million classes, the data against others, checkpoints, and the search (three quarters of an hour, 8 GB)
	@$(BIN)/python -m benchmarks.head
	@$(BIN)/python -m benchmarks.ranks
	@$(BIN)/python -m benchmarks.loader
	@$(BIN)/python -m benchmarks.shards
	@$(BIN)/python -m benchmarks.checkpoint
	@$(BIN)/python -m benchmarks.observer 100k
	@$(BIN)/python -m benchmarks.search

gpu-check: $(STAMP) ## accept a GPU machine: every part that meets the device (10 minutes; docs/gpu.md)
	@$(BIN)/python tools/gpu_acceptance.py --minutes 10 --out build/gpu-check

gpu-wheels: $(STAMP) ## collect what gpu-check needs on a machine with torch but no network (57 MiB)
	@$(BIN)/python tools/gpu_wheels.py --out build/gpu-wheels

clean: ## remove caches; runs/ and .venv stay
	@rm -rf build .cache *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean ## remove .venv as well
	@rm -rf $(VENV)

# ---- set-up ------------------------------------------------------------------------------------------------------------------

# $(call pip_install,ARGUMENTS): pip's messages go to the log; a terminal shows the latest one, a failure the last twenty.
define pip_install
	@DS_BUILD_OPS=0 $(BIN)/python -m pip install --no-input --progress-bar off $(1) 2>&1 | tee -a $(LOG) \
	| awk -v terminal="$$(if [ -t 2 ]; then echo 1; fi)" \
	  'terminal && /Collecting|Downloading|Building|Installing/ { printf "\r\033[K      %.72s", $$0; fflush() } \
	   END { if (terminal) printf "\r\033[K" }' \
	|| { tail -n 20 $(LOG); echo "pip failed; all of its messages are in $(LOG)"; exit 1; }
endef

$(STAMP):
	@candidates="$(or $(PYTHON),python3 python3.13 python3.12 python3.11)"; \
	for python in $$candidates; do \
	  if $$python -c 'import sys, ensurepip, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then break; fi; python=; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "expected Python 3.11 to 3.13 with the venv module, found none among: $$candidates"; \
	  echo "install it (Debian, Ubuntu: apt install python3 python3-venv) or name one: make setup PYTHON=/path/to/python3.11"; \
	  exit 1; \
	fi; \
	echo "[1/4] $$($$python --version) in .venv"; \
	if [ "$$(cat $(VENV)/made-for 2>/dev/null)" != "$(CURDIR)" ]; then \
	  $$python -m venv --clear $(VENV) && echo "$(CURDIR)" > $(VENV)/made-for; \
	fi
	@rm -f $(VENV)/installed-* $(LOG)
	@echo "[2/4] torch and torchvision (1 to 2 minutes, 3 GB)"
	$(call pip_install,-c constraints.txt torch torchvision)
	@echo "[3/4] DeepSpeed, WebDataset, faiss and the rest (about 2 minutes, 1.5 GB)"
	@if $(BIN)/python -m pip show --quiet faiss-cpu 2>/dev/null; then \
	  $(BIN)/python -m pip uninstall --quiet --yes faiss-cpu faiss-gpu 2>/dev/null; \
	fi # both own the module faiss, so removing one damages the other; the right one comes back with the rest
	$(call pip_install,-c constraints.txt -e '.[$(EXTRAS)]')
	@echo "[4/4] DeepSpeed's CPU communication extension (compiled once, about 1 minute)"
	@$(BIN)/python tools/warm_up_deepspeed.py >> $(LOG) 2>&1 || { tail -n 3 $(LOG); \
	  echo "could not compile it, so DeepSpeed will not start on CPUs here; GPUs do not need it. Expected a C++ compiler"; \
	  echo "(Debian, Ubuntu: apt install g++); after that: rm $@ && make setup. All messages are in $(LOG)"; }
	@grep -q TORCH_EXTENSIONS_DIR $(BIN)/activate \
	|| echo 'export TORCH_EXTENSIONS_DIR="$$VIRTUAL_ENV/torch_extensions"  # what make compiled for DeepSpeed' >> $(BIN)/activate
	@touch "$@"
