# Three commands for users; the rest is in CONTRIBUTING.md.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: quickstart demo test coverage docs

quickstart: $(VENV)/installed
	$(BIN)/python recipes/quickstart.py

# The demo page, at http://127.0.0.1:7860
demo: $(VENV)/demo-installed
	$(BIN)/python recipes/demo/app.py

# A process a core
test: $(VENV)/demo-installed
	$(BIN)/python -m pytest -n auto --dist worksteal

# The same with the package's coverage, which takes a quarter longer
coverage: $(VENV)/demo-installed
	$(BIN)/python -m pytest -n auto --dist worksteal --cov --cov-report=term-missing:skip-covered

# The site, in site/; a dead link or a docstring that cannot be rendered is an error
docs: $(VENV)/docs-installed
	$(BIN)/python -m mkdocs build --strict

$(VENV)/demo-installed: $(VENV)/installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[demo]"
	touch $@

$(VENV)/docs-installed: $(VENV)/installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[docs]"
	touch $@

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[recipes,test]"
	touch $@
