# Everything a newcomer needs. `make demo` and `make test` create .venv themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TYPES := .types/lmh

.PHONY: demo test lint docs types bench clean

demo: $(INSTALLED)
	mkdir -p runs/demo
	rm -f runs/demo/*
	$(BIN)/lmh-convert zoo:digits-cnn --timesteps 4 --data digits --finetune 5 --output runs/demo/digits-cnn-snn-T4.safetensors --report runs/demo/report.html
	$(BIN)/lmh report runs/demo/digits-cnn-snn-T4.safetensors --data digits

# files in their own order: xdist's would begin the longest, of few tests, last
test: $(INSTALLED)
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

lint: $(INSTALLED) types
	$(BIN)/ruff check .
	$(BIN)/mypy

# runs/site; warnings are errors.
docs: $(INSTALLED) types
	$(BIN)/mkdocs build --strict

# The tree as it installs, for tools that read sources.
types:
	rm -rf .types && mkdir -p $(TYPES)
	ln -s ../../convert ../../calibrate ../../finetune ../../zoo $(TYPES)/
	for file in lmh/*.py lmh/report lmh/py.typed; do ln -s ../../$$file $(TYPES)/; done

bench: $(INSTALLED)
	$(BIN)/python -m pip install --no-deps --requirement benchmarks/peers/requirements.txt
	$(BIN)/python benchmarks/all.py

clean:
	rm -rf $(VENV) .types build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis runs/demo
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A CPU build of torch is taken where the package index has one (constraints.txt).
$(INSTALLED): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 …")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,docs,onnx,nir,events]'
	touch $@
