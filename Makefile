# Two commands for users; the rest is in CONTRIBUTING.md.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: quickstart test

quickstart: $(VENV)/installed
	$(BIN)/python recipes/quickstart.py

# A process a core, each with one thread: the models are too small to share
test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --cov --cov-report=term-missing:skip-covered

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[recipes,test]"
	touch $@
