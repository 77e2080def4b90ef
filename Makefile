# Leapfrog in short commands. Needs git, make and Python 3.11 or newer; everything else goes into .venv.

PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install --quiet

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo app test test-slow fuzz lint format train-emoji figures gpu clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.installed ## write a picture from a prompt, exact and accelerated side by side, with the run report
	$(PY) -m pipelines.demo

app: $(VENV)/.installed ## open the page
	$(PY) app.py

test: $(VENV)/.installed-dev ## lint, types and tests; a finding of one does not hide the others
	@code=0; \
	$(PY) -m ruff check --quiet --output-format concise . || code=1; \
	$(PY) -m mypy --no-error-summary || code=1; \
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -m "not slow" --numprocesses=auto --maxprocesses=8 --dist=loadfile || code=$$?; \
	exit $$code

test-slow: $(VENV)/.installed-dev ## the tests that take half a minute and more each
	$(PY) -m pytest -q -m slow

fuzz: $(VENV)/.installed-dev ## the tests with made-up inputs, with new ones (make test takes the same each time)
	$(PY) -m pytest -q --hypothesis-profile=default $$(grep -rl "@given" tests)

lint: $(VENV)/.installed-dev ## ruff and mypy alone
	$(PY) -m ruff check .
	$(PY) -m mypy

format: $(VENV)/.installed-dev ## let ruff format the code and fix what it can
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

train-emoji: $(VENV)/.installed ## train the shipped model again, into runs/emoji; go on after a stop (options: TRAIN="--minutes 60")
	$(PY) -m training.train training/recipes/emoji.toml --out runs/emoji $(TRAIN)
	$(PY) -m training.enlarge training/recipes/emoji-enlarger.toml --out runs/enlarger
	$(PY) -m training.ship training/recipes/emoji.toml --transformer runs/emoji/transformer --codec runs/enlarger --out pipelines/checkpoints/emoji

figures: $(VENV)/.installed ## measure the figures again on this machine
	$(PY) -m benchmarks.figures

gpu: $(VENV)/.installed requirements-gpu.txt ## add xformers, for NVIDIA cards on Linux
	$(PIP) -r requirements-gpu.txt

clean: ## remove caches, build products and .venv; pictures and checkpoints stay
	rm -rf $(VENV) build dist leapfrog_dit.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps make every call after the first instant; a changed pin installs again.
$(VENV)/.installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("Leapfrog needs Python 3.11 or newer; $(PYTHON) is %d.%d. Name another: make PYTHON=python3.12" % v[:2])'
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo "Installing the pinned set into $(VENV): once, a few minutes, about 2 GB (more where torch brings CUDA)" >&2
	$(PIP) -r requirements.txt
	$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed
	$(PIP) -r requirements-dev.txt
	@touch $@
