# setup   .venv with the locked versions, .venv/bin/elastrain among them
# data    packs what the shipped pipelines read, into data/
# demo    trains a small network on the digits and shows its report
# demo-s3 does the same on an S3 server that it starts on this machine and stops again
# check   format, lint, direction of imports, types and the fast tests
# test    check, then the tests that start Ray or take long; JOBS files side by side, 3 unless told: they often wait
# test-gpu the tests that need a GPU
# format  lets ruff rewrite what it can
# bench   runs the benchmarks, at their smallest first
# soak    plays histories by chance, then repeats the tests that start Ray or take long: make soak ROUNDS=50, or SEED=7
# CI and the README use these and nothing else. Every target installs what it needs.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
# Hundreds of processes load the package in the tests: where this is set, each of them would compile it anew.
unexport PYTHONDONTWRITEBYTECODE
.PHONY: setup data demo demo-s3 _demo-s3 check test test-gpu format bench soak

PYTHON ?=
ROUNDS ?= 10
JOBS ?= 3
IS_OURS := import sys; sys.exit(sys.version_info[:2] != (3, 11))
BIN := .venv/bin
ELASTRAIN := $(BIN)/elastrain
TEST := $(BIN)/pytest -q
SIDE_BY_SIDE := $(TEST) -n $(JOBS) --dist loadfile --no-loadscope-reorder --durations=15

setup: .venv/.stamp
	@true

# Made again only when what is asked for changes; pip then moves only what differs from the lock.
.venv/.stamp: pyproject.toml constraints.txt
	@if ! $(BIN)/python -c '$(IS_OURS)' 2>/dev/null; then \
	  for python in $(if $(PYTHON),"$(PYTHON)",python3.11 python3); do \
	    if "$$python" -c '$(IS_OURS)' 2>/dev/null; then found="$$python"; break; fi; \
	  done; \
	  if test -z "$${found:-}"; then \
	    echo "make setup: Elastrain needs Python 3.11, which $(or $(PYTHON),python3.11 or python3 here) is not;" \
	      "install it, or name it: make setup PYTHON=/path/to/python3.11" >&2; exit 2; \
	  fi; \
	  "$$found" -m venv --clear .venv; \
	fi
	@echo "Installing the locked versions into .venv (about 2 GB; minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[digits,text,images,tables,optimizers,optuna,dev]'
	@touch $@

data: setup data/python-docs.txt
	$(ELASTRAIN) pack digits data/digits
	$(ELASTRAIN) pack text:data/python-docs.txt data/tiny_gpt --context 64

data/python-docs.txt: pipelines/tiny_gpt/text.py | .venv/.stamp
	$(BIN)/python pipelines/tiny_gpt/text.py $@

demo: setup
	$(ELASTRAIN) pack digits data/digits
	$(ELASTRAIN) train pipelines/digits_mlp/train.yaml
	$(ELASTRAIN) report runs/digits-mlp
	@echo "The same as a page: $(CURDIR)/runs/digits-mlp/report.html"

demo-s3: setup
	$(BIN)/python tests/s3_server.py $(MAKE) --no-print-directory _demo-s3

# Needs a server, which the environment leads to.
_demo-s3:
	$(ELASTRAIN) pack digits s3://$(BUCKET)/digits
	$(ELASTRAIN) train pipelines/digits_mlp/train.yaml --set storage=s3://$(BUCKET)/runs \
	  --set data.train=s3://$(BUCKET)/digits/train --set data.eval=s3://$(BUCKET)/digits/test
	$(ELASTRAIN) report s3://$(BUCKET)/runs/digits-mlp

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/mypy
	$(SIDE_BY_SIDE) -m 'not ray and not slow and not gpu and not bench'

test: check
	$(SIDE_BY_SIDE) -m 'ray or slow'

test-gpu: setup
	$(TEST) -m gpu

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup
	$(TEST) -m bench
	$(BIN)/python -m benchmarks

# Runs on processes that are killed, stopped and joined; the protocol alone, far more often; flipped bits and killed
# writers, with a seed that is told; then all, again and again.
soak: setup
	HISTORIES=180 $(TEST) -x tests/elastic/test_processes.py -k random
	CELL_HISTORIES=20 $(TEST) -x tests/elastic/test_verify.py -k disturbed_run
	HISTORIES=100000 $(TEST) -x tests/elastic/test_protocol.py
	@seed=$${SEED:-$$RANDOM}; echo "soak: SEED=$$seed for flipped bits and killed writers"; \
	FLIPS=400 KILLS=100 SEED=$$seed $(TEST) -x tests/test_integrity.py
	@for round in $$(seq $(ROUNDS)); do \
	  echo "soak: round $$round of $(ROUNDS)"; \
	  SOAK=1 $(TEST) -x -m 'ray or slow or bench'; \
	done
