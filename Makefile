# Two commands on a fresh machine with Python 3.11 or later: make demo, make test.
PYTHON ?= python3
BIN := .venv/$(if $(filter Windows_NT,$(OS)),Scripts,bin)

.PHONY: demo test lint
demo: .venv/ready  ## train, inflate, fine-tune and score on a synthetic task, in runs/demo
	rm -rf runs/demo
	$(BIN)/python examples/train_pancreas_3d.py --quick --out runs/demo

test: .venv/ready  ## all tests; those that need PyTorch run where it is installed
	$(BIN)/python -m pytest $(PYTEST)

lint: .venv/ready
	$(BIN)/pip install -q "ruff>=0.6" "mypy>=1.11"
	$(BIN)/ruff check .
	$(BIN)/mypy

.venv/ready: pyproject.toml
	test -e $(BIN)/python -o -e $(BIN)/python.exe || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q -e ".[test]"
	touch $@
