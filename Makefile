# The commands that the README and CI use. Everything goes into .venv; nothing but Python 3.11 and pip is needed.
PYTHON ?= python3
BIN := .venv/bin
# sleeping in place of spinning while threads wait: a busy neighbour would slow small tensors tenfold
export OMP_WAIT_POLICY ?= PASSIVE
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-slow style bench

demo: .venv/demo.stamp  ## fine-tunes on handwritten digits and shows predictions
	$(BIN)/accelerate launch finetune.py

test: .venv/test.stamp  ## lint and tests
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

test-slow: .venv/test.stamp  ## full-size models and memory bounds, minutes each
	$(BIN)/python -m pytest -m slow

style: .venv/test.stamp  ## formats, and sorts imports
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/test.stamp  ## ViTReg against transformers and timm
	$(BIN)/python benchmarks/inference.py
	$(BIN)/python benchmarks/inference_sizes.py
	$(BIN)/python benchmarks/training_step.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/load_time.py

# pip is the last that venv writes: an interrupted one is made again
.venv/bin/pip:
	$(PYTHON) -m venv --clear .venv

.venv/demo.stamp: .venv/bin/pip pyproject.toml constraints.txt
	$(INSTALL) --editable .
	touch $@

.venv/test.stamp: .venv/bin/pip pyproject.toml constraints.txt
	$(INSTALL) --editable ".[test]"
	touch $@ .venv/demo.stamp
