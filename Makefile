VENV ?= .venv
PYTHON ?=
OUT ?= runs/emoji
OVERWRITE ?=

py = "$(VENV)/bin/python"
# Python compiles what is imported; to compile everything here would double the time of an installation.
pip = $(py) -m pip install -qq --disable-pip-version-check --no-compile

# Compiled bytecode stays in $(VENV) even where the machine says otherwise, as container images do: every start of
# Python imports two thousand modules.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test lint types pytest quick fuzz docs notebooks format env dev-env docs-env venv which-python clean
.DEFAULT_GOAL := help

help:
	@echo 'make demo          set up $(VENV) and run the emoji demo into $(OUT)'
	@echo 'make env           set up $(VENV), no more'
	@echo 'make test          what CI runs: ruff, mypy and pytest'
	@echo 'make lint types pytest    one part of it (pytest takes ARGS="-k name")'
	@echo 'make quick         the facts of the method and one run, in two minutes'
	@echo 'make fuzz          100,000 damaged files of every kind, an hour or more (ARGS="--files 1000"); findings go to .cache/fuzz'
	@echo 'make docs          the pages of docs/ as a site, into .cache/site'
	@echo 'make notebooks     execute those of docs/ in full, and keep what they show'
	@echo 'make format        let ruff rewrite the code'
	@echo 'make which-python  the interpreter that a new $(VENV) would get'
	@echo 'make clean         remove caches and build outputs; $(VENV) and runs stay'
	@echo
	@echo 'PYTHON=path  this interpreter and no other'
	@echo 'VENV=folder  another virtual environment than .venv'
	@echo 'OUT=folder OVERWRITE=1  of the demo'

demo: env
	@$(py) -m afa_jax.demo --out "$(OUT)" $(if $(filter-out 0,$(OVERWRITE)),--overwrite)

test: lint types pytest

lint: dev-env
	@$(py) -m ruff check .
	@$(py) -m ruff format --check .
	@said=$$("$(VENV)/bin/lint-imports" --cache-dir .cache/importlinter 2>&1) || { echo "$$said"; exit 1; }

types: dev-env
	@$(py) -m mypy

pytest: dev-env
	@$(py) -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile --no-loadscope-reorder $(ARGS)

# What to run while writing: the method's facts, the seams, the example, and one run from training to a picture.
QUICK = tests/diffusion tests/fusion/test_facts.py tests/fusion/test_sabw.py tests/test_seams.py tests/test_from_scratch.py \
  tests/test_schema.py tests/training/test_inputs.py tests/commands/test_commands.py::test_training_writes_what_sampling_needs

quick: dev-env
	@$(py) -m pytest --numprocesses=2 --dist=load $(QUICK) $(ARGS)

fuzz: dev-env
	@$(py) -m tests.fuzz --keep .cache/fuzz $(ARGS)

# Strict: a link or a page that is not there is an error. The variable silences an advertisement.
docs: docs-env
	@NO_MKDOCS_2_WARNING=1 $(py) -m mkdocs build --quiet --strict
	@echo 'the site: .cache/site/index.html (with its search: $(VENV)/bin/python -m http.server -d .cache/site)'

notebooks: docs-env
	@$(py) scripts/run_notebooks.py

format: dev-env
	@$(py) -m ruff check --fix .
	@$(py) -m ruff format .

clean:
	@rm -rf .cache build dist *.egg-info
	@find afa_jax configs tests scripts -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# A stamp in $(VENV) holds what was installed: the checkout's path and the sum of the files. The sums are compared, not
# the dates, so a fresh clone or a moved folder cannot fool it.

env: venv
	@want="$$(pwd) $$(cat requirements.txt pyproject.toml | cksum)"; \
	if [ "$$(cat "$(VENV)/.afa-env" 2>/dev/null)" != "$$want" ]; then \
	  echo 'installing requirements.txt into $(VENV): minutes the first time'; \
	  $(pip) -r requirements.txt -e . && echo "$$want" > "$(VENV)/.afa-env"; \
	fi

dev-env: env
	@want="$$(cat requirements.txt requirements-dev.txt | cksum)"; \
	if [ "$$(cat "$(VENV)/.afa-dev-env" 2>/dev/null)" != "$$want" ]; then \
	  echo 'installing requirements-dev.txt into $(VENV)'; \
	  $(pip) -r requirements.txt -r requirements-dev.txt && echo "$$want" > "$(VENV)/.afa-dev-env"; \
	fi

docs-env: env
	@want="$$(cat requirements-docs.txt | cksum)"; \
	if [ "$$(cat "$(VENV)/.afa-docs-env" 2>/dev/null)" != "$$want" ]; then \
	  echo 'installing requirements-docs.txt into $(VENV)'; \
	  $(pip) -r requirements-docs.txt && echo "$$want" > "$(VENV)/.afa-docs-env"; \
	fi

# An environment that works stays, whatever made it; one whose interpreter is gone is made again.
venv:
	@if $(py) -c '' 2>/dev/null; then :; \
	elif [ -e "$(VENV)" ] && [ ! -f "$(VENV)/pyvenv.cfg" ]; then \
	  echo "$(VENV) exists and is no virtual environment: name another by VENV=" >&2; exit 1; \
	elif [ -z "$(PYTHON)" ] && command -v uv >/dev/null; then \
	  echo 'making $(VENV) with uv'; uv venv -q --no-project --clear --python '>=3.11,<3.15' "$(VENV)"; \
	else \
	  python=$$($(quiet_make) which-python) || exit 1; \
	  echo "making $(VENV) with $$python"; "$$python" -m venv --clear "$(VENV)"; \
	fi; \
	$(py) -c 'import pip' 2>/dev/null || $(py) -m ensurepip >/dev/null

# Not named $(MAKE) in the recipe: make would run that line even under -n.
quiet_make = $(MAKE) -s --no-print-directory
# What a Python must be: one that jax has wheels for, whole enough to make an environment.
fits = import ensurepip, ssl, sys, venv; v = sys.version_info; sys.exit(not (3, 11) <= v[:2] <= (3, 14) or v[3] != "final")
names = $(foreach v,14 13 12 11,python3.$(v) "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.$(v).*/bin/python3) python3 python

# Each is run: a name on PATH may be a shim that only answers with an error.
which-python:
	@for python in $(if $(PYTHON),"$(PYTHON)",$(names)); do \
	  if "$$python" -c '$(fits)' 2>/dev/null; then command -v "$$python"; exit; fi; \
	done; \
	echo 'No Python 3.11 to 3.14 with venv, pip and ssl: install one or uv, or name one by PYTHON=path' >&2; exit 1
