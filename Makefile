PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
BIN := $(VENV)/bin

.PHONY: demo test lint bench

demo: $(READY)  ## three classifiers on scikit-learn's digits, from images to a table and a picture
	$(BIN)/python benchmarks/demo.py

test: $(READY)  ## all tests, a process for each core
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python benchmarks/extraction.py --memory --json benchmarks/extraction.json
	$(BIN)/python benchmarks/store.py --json benchmarks/store.json
	$(BIN)/python benchmarks/codecs.py --json benchmarks/codecs.json
	$(BIN)/python benchmarks/durability.py --json benchmarks/durability.json
	$(BIN)/python benchmarks/timm_sweep.py --json benchmarks/timm_sweep.json
	$(BIN)/python benchmarks/cluster.py --json benchmarks/cluster.json
	$(BIN)/python benchmarks/scale.py --json benchmarks/scale.json --page benchmarks/SCALE.md
	$(BIN)/python benchmarks/group_lasso.py --json benchmarks/group_lasso.json --plot benchmarks/group_lasso.svg
	$(BIN)/python benchmarks/tuning.py --json benchmarks/tuning.json --plots benchmarks
	$(BIN)/python benchmarks/reads.py --json benchmarks/reads.json
	$(BIN)/python benchmarks/transfer.py
	$(BIN)/python benchmarks/ablations.py

$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@
