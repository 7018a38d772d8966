PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CONSTRAINTS := constraints.txt

.PHONY: setup demo demo-ddpo test check docs dist clean

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -c 'import sys; sys.exit("Palate needs Python 3.11 or later, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[dev]'
	touch $@

setup: $(VENV)/.installed

demo: setup
	$(BIN)/palate train miniature-sdxl-ncp-dpo --output_dir out/demo-$$(date +%Y%m%d-%H%M%S)

demo-ddpo: setup
	$(BIN)/palate train miniature-ddpo-is --output_dir out/demo-ddpo-$$(date +%Y%m%d-%H%M%S)

test: setup
	$(BIN)/python -m pytest -n 2 --dist worksteal

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

$(VENV)/.docs $(VENV)/.dist: $(VENV)/.%: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[$*]'
	touch $@

docs: $(VENV)/.docs
	$(BIN)/mkdocs build --strict --quiet

dist: $(VENV)/.dist
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/twine check --strict dist/*

clean:
	rm -rf $(VENV) out build
