# On a fresh machine with Python 3.11 or later: make demo, make test, make notebooks, make docs.
PYTHON ?= python3
BIN := .venv/$(if $(filter Windows_NT,$(OS)),Scripts,bin)

.PHONY: demo test notebooks docs lint
demo: .venv/ready  ## train, inflate, fine-tune and score on a synthetic task, in runs/demo
	rm -rf runs/demo
	$(BIN)/python examples/train_pancreas_3d.py --quick --out runs/demo

test: .venv/ready  ## all tests; those that need PyTorch run where it is installed
	$(BIN)/python -m pytest $(PYTEST)

notebooks: .venv/ready  ## the lessons, run with their solutions: pages in runs/lessons, and their times
	$(BIN)/pip install -q -e ".[lessons]"
	$(BIN)/python examples/notebooks/lessons.py
	$(BIN)/python examples/notebooks/lessons.py --run runs/lessons

docs: .venv/ready  ## every public name, the lessons and pages about one subject each, in runs/docs
	$(BIN)/pip install -q -e ".[docs]"
	$(BIN)/pdoc tinyseg tinyseg.job -o runs/docs
	$(BIN)/python examples/notebooks/lessons.py --run runs/docs

lint: .venv/ready
	$(BIN)/pip install -q "ruff>=0.6" "mypy>=1.11"
	$(BIN)/ruff check .
	$(BIN)/mypy

.venv/ready: pyproject.toml
	test -e $(BIN)/python -o -e $(BIN)/python.exe || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q -e ".[test]"
	touch $@
