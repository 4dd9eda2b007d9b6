# Two commands do everything: `make book` and `make test`. Both set up .venv first, once.
SHELL := /bin/bash
.SHELLFLAGS := -eo pipefail -c
.DEFAULT_GOAL := help
# The first Python that is new enough; `make book PYTHON=...` decides otherwise.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
READY := .venv/.installed

.PHONY: help book test unit chapters site site-tests outputs pages clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

$(READY): requirements.txt pyproject.toml
	@test -n "$(PYTHON)" && $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "This project needs Python 3.11 or newer and '$(or $(PYTHON),python3)' is not; install one, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "Python's venv and pip are missing; install them (Debian, Ubuntu: apt install python3-venv) and try again."; exit 1; }
	@echo "Setting up .venv (a few minutes, once) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

book: site  ## build the HTML book and say where to open it
	@$(BIN)/python -c 'import pathlib; print("The book is ready:", pathlib.Path("_build/html/index.html").absolute().as_uri())'

# Always from nothing: Sphinx does not repeat the warnings of a page it has cached, so a failed build would pass next time.
site: $(READY)
	@rm -rf _build
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
	$(BIN)/python tools/claims_page.py
	$(BIN)/python tools/make_tables.py

clean:  ## remove the built site and the environment
	rm -rf _build .venv
