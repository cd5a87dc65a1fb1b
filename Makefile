# Two commands for users, `make demo` and `make test`; three more for developers.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
DEMO_RUN = runs/demo
READY = $(VENV)/.installed
PIP = $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-slow check bench clean

demo: $(READY)  ## Train, calibrate, evaluate and time a three-exit network on real digits.
	rm -rf $(DEMO_RUN)
	$(BIN)/python -m offramp train digits-mlp --out $(DEMO_RUN)
	$(BIN)/python -m offramp calibrate $(DEMO_RUN) --max-drop 0.01
	$(BIN)/python -m offramp evaluate $(DEMO_RUN)
	$(BIN)/python -m offramp time $(DEMO_RUN)
	@echo "The run is in $(DEMO_RUN)"

test: $(READY)  ## The fast tests.
	$(BIN)/python -m pytest -q --cov --cov-report=term:skip-covered --cov-fail-under=90

test-slow: $(READY)  ## The tests that take minutes; some need OFFRAMP_DATA.
	$(BIN)/python -m pytest -q -m slow

check: $(READY)  ## Format, lint, types, layers.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(READY)  ## The clock: loader, tutorial loop, engines; needs OFFRAMP_DATA and runs/emnist-mlp.
	$(BIN)/python benchmarks/loader.py
	$(BIN)/python benchmarks/tutorial_loop.py runs/emnist-mlp
	$(BIN)/python benchmarks/clock.py

# torch first and alone: asked for in any other way, pip may take a build with gigabytes of CUDA.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e '.[train,dev]'
	touch $(READY)

clean:
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache
