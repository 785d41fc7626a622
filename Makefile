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

.PHONY: help demo test lint types pytest fuzz format env dev-env venv which-python clean
.DEFAULT_GOAL := help

help:
	@echo 'make demo          set up $(VENV) and run the emoji demo into $(OUT)'
	@echo 'make test          what CI runs: ruff, mypy and pytest'
	@echo 'make lint types pytest    one part of it (pytest takes ARGS="-k name")'
	@echo 'make fuzz          100,000 damaged files of every kind, an hour or more (ARGS="--files 1000"); findings go to .cache/fuzz'
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
	@"$(VENV)/bin/lint-imports" --cache-dir .cache/importlinter

types: dev-env
	@$(py) -m mypy

pytest: dev-env
	@$(py) -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile --no-loadscope-reorder $(ARGS)

fuzz: dev-env
	@$(py) -m tests.fuzz --keep .cache/fuzz $(ARGS)

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

# An environment that works stays, whatever made it; one whose interpreter is gone is made again. Where PYTHON asks for
# another interpreter than it holds, this stops rather than remove anything.
venv:
	@if found=$$($(py) -c '$(version)' 2>/dev/null); then \
	  [ -z "$(PYTHON)" ] || { \
	    asked=$$("$(PYTHON)" -c '$(version)') || { echo "PYTHON=$(PYTHON) does not run" >&2; exit 1; }; \
	    [ "$$asked" = "$$found" ] || { \
	      echo "$(VENV) holds Python $$found, PYTHON=$(PYTHON) is $$asked: remove $(VENV), or name another by VENV=" >&2; \
	      exit 1; }; }; \
	  $(py) -c 'import pip' 2>/dev/null || $(py) -m ensurepip >/dev/null; \
	elif [ -e "$(VENV)" ] && [ ! -f "$(VENV)/pyvenv.cfg" ]; then \
	  echo "$(VENV) exists and is no virtual environment" >&2; exit 1; \
	else \
	  python=$$($(quiet_make) which-python) || exit 1; \
	  echo "making $(VENV) with $$python"; \
	  "$$python" -m venv --clear "$(VENV)"; \
	fi

version = import sys; print("%d.%d.%d" % sys.version_info[:3])
# Not named $(MAKE) in the recipe: make would run that line even under -n.
quiet_make = $(MAKE) -s --no-print-directory

# What every candidate is asked: it answers its version as a number that sorts, or why it will not do. Runs under
# Python 2 as well.
probe = import sys; v = sys.version_info; \
  why = "older than 3.11" if v < (3, 11) else "newer than 3.14: jax may have no wheels" if v >= (3, 15) else \
    "a pre-release" if v[3] != "final" else "not CPython" if sys.implementation.name != "cpython" else \
    "free-threaded" if __import__("sysconfig").get_config_var("Py_GIL_DISABLED") else ""; \
  why and sys.exit("%d.%d.%d is %s" % (v[:3] + (why,))); \
  import ctypes, ensurepip, ssl, venv; \
  sys.stdout.write("%d%03d%03d" % v[:3])

# To try the names from the newest down is not enough: a name on PATH may be a shim that only answers with an error, and
# python3 may be newer than any python3.N. So every candidate is run, and the highest version wins; of equals, the first.
which-python:
	@newline=$$(printf '\n.'); newline=$${newline%.}; best=; best_version=0; refused=; \
	try() { \
	  if answer=$$("$$1" -c '$(probe)' 2>&1 </dev/null); then \
	    answer=$$(printf '%s\n' "$$answer" | tail -n 1); \
	    expr "$$answer" : '[0-9][0-9]*$$' >/dev/null || return 0; \
	    [ "$$answer" -le "$$best_version" ] || { best=$$1; best_version=$$answer; }; \
	  else \
	    case $$answer in Traceback*) line=tail;; *) line=head;; esac; \
	    refused="$$refused  $$1: $$(printf '%s\n' "$$answer" | $$line -n 1)$$newline"; \
	  fi; \
	}; \
	if [ -n "$(PYTHON)" ]; then \
	  try "$(PYTHON)"; \
	else \
	  own=$$(cd "$(VENV)/bin" 2>/dev/null && pwd -P); \
	  set -f; IFS=:; set -- $$PATH; unset IFS; set +f; \
	  for folder in "$$@" "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/*/bin; do \
	    [ "$$(cd "$$folder" 2>/dev/null && pwd -P)" != "$$own" ] || continue; \
	    for name in python3.14 python3.13 python3.12 python3.11 python3 python; do \
	      [ ! -f "$$folder/$$name" ] || [ ! -x "$$folder/$$name" ] || try "$$folder/$$name"; \
	    done; \
	  done; \
	fi; \
	if [ -n "$$best" ]; then echo "$$best"; exit 0; fi; \
	echo 'No Python 3.11 to 3.14 with venv, pip and ssl was found; name one by PYTHON=path. Tried:' >&2; \
	printf '%s' "$${refused:-  nothing: no python on PATH or in the versions folder of pyenv$$newline}" >&2; \
	exit 1
