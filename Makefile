# make train  meta-trains the paper's method on glyphs      make test  runs the tests
# make lint   formatter, linter, types, imports, workflows  make clean removes what the others made
# make regress compares fixed counts of cost (bytes, FLOPs, compilations) with their limits
# make bench-accelerator  measures what only a GPU or TPU can answer, with the Python that sees it
# make docs   builds the documentation into site/ (warnings are errors; nothing is fetched)
# make test-slow    whole runs by the command line, pages, several devices, exports, populations, kills, notebooks
# make test-plain   a sample of the tests as a user runs the library: annotations unchecked, XLA's optimiser on
# make test-latest  the tests on the newest Python from 3.12 on, with the newest packages, in .venv-latest
# All but bench-accelerator, test-latest and clean first make .venv with the pinned versions of requirements.lock.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
LATEST := .venv-latest
PLAIN := $(addprefix tests/test_,$(addsuffix .py,imports inner linear_solve structural_zeros meta_step algorithms wrong_use))
READY := $(VENV)/.ready

.PHONY: setup train test test-slow test-plain test-latest regress bench-accelerator lint format docs clean

setup: $(READY)

$(READY): requirements.lock pyproject.toml
	@echo "memmeta: making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@echo "memmeta: installing the pinned packages of requirements.lock (some minutes the first time)"
	@$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.lock
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@

train: $(READY)
	@echo "memmeta: meta-training memory_reduced on glyphs (memmeta train --help lists the options)"
	@$(BIN)/memmeta train $(ARGS)

test: $(READY)
	@echo "memmeta: running the tests, slowest listed last"
	@$(BIN)/pytest -n 2 --durations=15 $(ARGS)

test-slow: $(READY)
	@$(BIN)/pytest -m slow -n 2 --durations=15 $(ARGS)

test-plain: $(READY)
	@echo "memmeta: a sample of the tests, annotations unchecked and XLA as it comes"
	@MEMMETA_TESTS=plain $(BIN)/pytest -n 2 --durations=5 $(PLAIN) $(ARGS)

test-latest:
	@newest="$(or $(NEWEST),$$(scripts/newest_python.sh))" \
	&& echo "memmeta: the newest packages for $$($$newest --version), in $(LATEST) (some minutes the first time)" \
	&& (test -x $(LATEST)/bin/pip || $$newest -m venv $(LATEST))
	@sed 's/==.*//' requirements.lock | $(LATEST)/bin/pip install --quiet --disable-pip-version-check --upgrade -r /dev/stdin
	@$(LATEST)/bin/pip install --quiet --disable-pip-version-check --no-deps -e .
	@$(LATEST)/bin/pip list --disable-pip-version-check | grep -E '^(flax|jax|numpy|optax|orbax-checkpoint) '
	@$(LATEST)/bin/pytest -n 2 --durations=15 $(ARGS)

regress: $(READY)
	@echo "memmeta: comparing fixed counts of cost with their limits"
	@$(BIN)/python -m benchmarks.regress

# No .venv: the JAX of requirements.lock knows no accelerator, the image of one brings its own.
bench-accelerator:
	@echo "memmeta: measuring on what $$($(PYTHON) --version)'s JAX sees (PYTHON=... names another)"
	@$(PYTHON) -m benchmarks.accelerator $(ARGS)

lint: $(READY)
	@echo "memmeta: formatter, linter, type checker, import rules, workflows"
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/zizmor --offline --quiet --strict-collection .

format: $(READY)
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

docs: $(READY)
	@echo "memmeta: building the documentation into site/"
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) $(LATEST) .jax_cache .mypy_cache .ruff_cache .hypothesis dist site
