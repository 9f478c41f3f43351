# Two commands do everything from a bare Python 3.11 or 3.12: `make demo` and `make test`.
#   make PYTHON=/path/to/python3.12 ...   another interpreter than the first one found
#   make VENV=/path ...                   another place for the virtual environment
#   make TORCH_INDEX=URL ...              an index with CPU builds of torch (pip's own gives CUDA builds on Linux)
VENV ?= .venv
export PYTHON TORCH_INDEX
ifeq ($(origin PYTHON),undefined)
unexport PYTHON
endif
ifeq ($(origin TORCH_INDEX),undefined)
unexport TORCH_INDEX
endif

BIN := $(VENV)/bin
# one process per core, at most four; each test computes on one core (tests/conftest.py)
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadgroup

.PHONY: help demo test test-slow test-all tables lint format venv clean

help:
	@echo "make demo      sample photographs, a student distilled by DCKD, a table and a picture (about 5 minutes)"
	@echo "               make demo TASK=rain: deraining, distilled by SLKD"
	@echo "make test      the tests, without the slow ones;  make test-all: all of them"
	@echo "make tables    the tables of README.md and docs/recipes.md, from the option files and the registries"
	@echo "make lint      ruff and mypy;  make format: ruff's formatter"
	@echo "make venv      only the virtual environment;  make clean: removes it, the sample data and caches"

venv:
	@requirements/install.sh $(VENV)

demo: venv
	@$(BIN)/kdsr demo $(if $(TASK),--task $(TASK))

test: venv
	@$(PYTEST) -m "not slow"

test-slow: venv
	@$(PYTEST) -m slow

test-all: venv
	@$(PYTEST)

tables: venv
	@$(BIN)/kdsr list --into README.md
	@$(BIN)/kdsr list --recipes --into docs/recipes.md

lint: venv
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: venv
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

# Leaves experiments/ and every data set but the generated sample alone.
clean:
	@if [ -e "$(VENV)" ] && [ ! -f "$(VENV)/pyvenv.cfg" ]; then \
		echo "kdsr: $(VENV) is no virtual environment; it stays" >&2; exit 2; fi
	rm -rf "$(VENV)" datasets/sample datasets/sample_rain build *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find kdsr tests -name __pycache__ -type d -prune -exec rm -rf {} +
