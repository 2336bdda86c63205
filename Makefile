# Everything runs in .venv, which the first target makes from constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1
export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/$(VENV)/torch_extensions

.PHONY: install demo test test-quick test-rooms test-rooms-slower test-rooms-others test-cluster \
	test-runs test-launches test-long test-long-runs test-long-others check format docs clean

install: $(VENV)/.installed

# A folder that an older Python has made, or that was left without pip, is not kept.
SUITS := -c 'import sys; sys.exit(sys.version_info < (3, 11))'

$(VENV)/.installed: pyproject.toml constraints.txt
	@{ $(BIN)/python $(SUITS) && { $(BIN)/python -m pip --version || $(BIN)/python -m ensurepip; }; } \
	>/dev/null 2>&1 || rm -rf $(VENV)
	@test -d $(VENV) || $(PYTHON) $(SUITS) || { echo "keepstep needs Python 3.11 or newer, and" \
	"$(PYTHON) is $$($(PYTHON) --version 2>&1). Another one: make install PYTHON=python3.11" >&2; exit 1; }
	test -d $(VENV) || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# What DeepSpeed compiles on CPU at its first use: for minutes, while the ranks of a test would wait.
$(VENV)/.extensions: $(VENV)/.installed
	PATH="$(CURDIR)/$(BIN):$$PATH" DS_ACCELERATOR=cpu $(BIN)/python -c "from deepspeed.ops.op_builder \
	import cpu; cpu.ShareMemCommBuilder().load(); cpu.CPUAdamBuilder().load()" >/dev/null
	touch $@

demo: install
	PATH="$(CURDIR)/$(BIN):$$PATH" launch/demo.sh

# What trains or launches, and so waits for those extensions; the rooms' own tests do not.
RUNNING := tests/slurm tests/multiprocess tests/crash tests/e2e tests/gpu tests/hub
ROOMS := $(filter-out $(RUNNING) tests/helpers tests/rank_programs, $(patsubst %/,%,$(dir $(wildcard tests/*/__init__.py))))
SLOWER := tests/run_folder tests/disk tests/save tests/recipe
PYTEST := $(BIN)/python -m pytest -m 'not long'

test: install # three campaigns at a time: all of them wait more than they work
	$(MAKE) --jobs=3 --output-sync=target test-rooms test-cluster test-runs test-launches

test-quick: install # under three minutes: no launch, no training on several processes
	$(MAKE) --jobs=2 --output-sync=target test-rooms-slower test-rooms-others

test-rooms: test-rooms-slower test-rooms-others

test-rooms-slower: install
	$(PYTEST) -q $(filter $(SLOWER), $(ROOMS))

test-rooms-others: install
	$(PYTEST) -q $(filter-out $(SLOWER), $(ROOMS))

test-cluster: $(VENV)/.extensions
	$(PYTEST) tests/slurm

test-runs: $(VENV)/.extensions
	$(PYTEST) tests/multiprocess

test-launches: $(VENV)/.extensions
	$(PYTEST) tests/crash tests/e2e tests/gpu tests/hub

test-long: install $(VENV)/.extensions # two at a time
	$(MAKE) --jobs=2 --output-sync=target test-long-runs test-long-others

test-long-runs:
	$(BIN)/python -m pytest -m long tests/multiprocess

test-long-others:
	$(BIN)/python -m pytest -m long --ignore tests/multiprocess

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: install # the parts of the documents that the code knows best: fields, commands, files
	$(BIN)/python docs/reference.py

clean:
	rm -rf .demo runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
