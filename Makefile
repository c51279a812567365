# Every target sets up what it needs: a machine with make and Python 3.11 or later is enough. After set-up nothing needs the network.

PYTHON ?= $(shell for name in python3 python3.13 python3.12 python3.11 python; do \
	"$$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo "$$name"; break; }; done)
VENV ?= .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt
PROMPT ?= Give me three tips for better sleep.

.PHONY: help demo test check lint types format setup clean

help:
	@echo "make demo    answer a prompt with both decoders, side by side (PROMPT=\"...\" for another one)"
	@echo "make test    lint, import direction, types and all tests"
	@echo "make check   the same without the tests"
	@echo "make format  let ruff format and fix the code"
	@echo "make setup   only the environment and the models"

demo: $(VENV)/.models
	$(BIN)/refusion generate --compare "$(PROMPT)"

test: check
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

check: lint types

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tools/check_imports.py

types: setup
	$(BIN)/pyright

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

setup: $(VENV)/.dev $(VENV)/.models

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or later is needed; name it with make PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Only what using the package takes; the model is fetched by the package itself.
$(VENV)/.installed: $(VENV)/bin/python pyproject.toml constraints.txt
	@echo "installing refusion and its dependencies into $(VENV)" >&2
	$(PIP_INSTALL) --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.installed
	@echo "installing what tests, training and evaluation need" >&2
	$(PIP_INSTALL) --editable '.[train,eval,plot,dev]'
	@touch $@

# Phony in effect: `models pull` knows best whether a model is there and current, and is quick if it is.
.PHONY: $(VENV)/.models
$(VENV)/.models: $(VENV)/.installed
	$(BIN)/refusion models pull smollm2-135m >/dev/null
	@if [ -f src/refusion/weights/smollm2-135m-refusion.safetensors ]; then $(BIN)/refusion models pull smollm2-135m-refusion >/dev/null; fi

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
