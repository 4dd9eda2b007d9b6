# Two commands do everything: `make book` and `make test`. Both set up .venv first, once.
SHELL := /bin/bash
.SHELLFLAGS := -eo pipefail -c
.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.installed

.PHONY: help book test unit chapters site site-tests outputs pages clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

$(READY): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "This project needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || true). Try: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "Python's venv and pip are missing; install them (Debian, Ubuntu: apt install python3-venv) and try again."; exit 1; }
	@echo "Setting up .venv (a few minutes, once) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

book: site  ## build the HTML book and say where to open it
	@echo "The book is ready: file://$(CURDIR)/_build/html/index.html"

site: $(READY)
	$(BIN)/jupyter-book build . -n -W --keep-going --quiet
	@$(BIN)/python tools/pages_exist.py

test: unit chapters site site-tests  ## everything that must pass

unit: $(READY)  ## the library's tests
	$(BIN)/python -m pytest -q tests --ignore=tests/book

chapters: $(READY)  ## every chapter under strict nbval: outputs must be reproduced exactly
	$(BIN)/python -m pytest -q --nbval --nbval-current-env -p no:randomly chapters/

site-tests: $(READY) site
	$(BIN)/python -m pytest -q tests/book

outputs: $(READY)  ## re-execute changed chapters (or CHAPTER=chapters/01_architecture.ipynb)
	$(BIN)/python tools/outputs.py $(CHAPTER)

pages: $(READY)  ## regenerate claims.md, models.md and hardware.md
	$(BIN)/python -m gpt4lib.ledger.page
	$(BIN)/python tools/make_tables.py

clean:  ## remove the built site and the environment
	rm -rf _build .venv
