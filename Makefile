PYTHON ?= python3
BIN := .venv/bin

.PHONY: run test lint format bench clean

run: .venv/ready  ## Start the app on the bundled model at http://127.0.0.1:8501
	$(BIN)/python -m zo_core app

test: .venv/ready-dev  ## All tests; browser tests need chromium, GPU tests a GPU
	$(BIN)/python -m pytest -n auto --maxprocesses 4 tests/unit
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder \
		tests/e2e tests/integration/test_survival.py tests/integration

lint: .venv/ready-dev  ## Style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/ready-dev  ## Rewrite the code in the project's style
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: .venv/ready  ## Time the main job on this machine against its targets (README, "Speed")
	$(BIN)/python -m zo_core bench

.venv/ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ZOScope needs Python 3.11 or later: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/ready-dev: requirements.txt requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ZOScope needs Python 3.11 or later: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch .venv/ready $@

clean:  ## Remove the environment and tool caches; runs in cache/ stay
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache
