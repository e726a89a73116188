# make paper   every figure, table and number from the committed run records, then the PDF (paper/build/main.pdf)
# make test    the tests, and every library notebook from top to bottom
# Each does the set-up it needs: a virtual environment in .venv, at the versions of constraints.txt.

SHELL       := /bin/bash
PYTHON      ?= python3
PROFILE     ?= paper
BIN         := .venv/bin
# named after what it was set up from, since tools rewrite files without changing them
READY       := .venv/.ready-$(shell cat constraints.txt pyproject.toml | cksum | cut -d' ' -f1)
EXPERIMENTS := $(notdir $(basename $(wildcard nbs/exp_*.ipynb)))
# those whose tables are committed: an experiment that lacks records of the profile would make them now, which takes a GPU
PUBLISHED   := $(foreach e,$(EXPERIMENTS),$(if $(shell grep -m1 '"$e"' tables/manifest.json),$(e)))

export SOURCE_DATE_EPOCH ?= 1764547200
export PYTHONHASHSEED    ?= 0

.PHONY: paper figures publish test peers smoke notebooks check bench lab setup clean
.DELETE_ON_ERROR:

paper: figures
	paper/build.sh

# One notebook after the other, each with outputs, to read in paper/build/nbs.
figures: $(READY)
	@mkdir -p paper/build/nbs
	@set -e; for e in $(PUBLISHED); do $(BIN)/papermill --log-level WARNING --no-progress-bar nbs/$$e.ipynb paper/build/nbs/$$e.ipynb -p profile $(PROFILE); done

# The committed copy of the PDF.
publish: paper
	cp paper/build/main.pdf paper/main.pdf

test: $(READY)
	$(BIN)/pytest
	$(BIN)/nbdev-test --n-workers 0 --file-re '^\d.*ipynb'

# The comparisons with other implementations alone, with the numbers of agreements.
peers: $(READY)
	$(BIN)/pytest tests/peers -s

# The smoke profile from scratch, then once more under nbval: the same outputs.
smoke: $(READY)
	@mkdir -p build/smoke
	@set -e; for e in $(EXPERIMENTS); do rm -rf runs/$${e#exp_}/smoke; \
	  $(BIN)/papermill --log-level WARNING --no-progress-bar nbs/$$e.ipynb build/smoke/$$e.ipynb; done
	$(BIN)/pytest --nbval --nbval-sanitize-with tests/nbval.ini build/smoke

# Library from notebooks, and the notebooks with the outputs of a clean run.
notebooks: $(READY)
	$(BIN)/nbdev-test --save --n-workers 0 --file-re '^\d.*ipynb'
	$(BIN)/nbdev-clean
	$(BIN)/nbdev-export

# What is committed is what comes out: notebooks, library, figures, tables, PDF.
check: notebooks paper
	git diff --exit-code --stat
	@if [ -e paper/build/main.pdf ]; then cmp paper/build/main.pdf paper/main.pdf; fi

# What the project promises to stay below, measured.
bench: $(READY)
	$(BIN)/python tests/benchmark.py

lab: $(READY)
	$(BIN)/jupyter lab nbs

setup: $(READY)
$(READY):
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,lab]'
	@rm -f .venv/.ready-* && touch $@

clean:
	rm -rf build paper/build
