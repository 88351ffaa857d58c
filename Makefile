# `make demo` and `make test` work on a machine with nothing but Python (3.11 or newer) and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SLOW := $(VENV)/.slow
NEWEST := .venv-newest
# Of what is installed and of what builds it; pip from 25.3 on asks for the second by a name of its own.
PINNED := PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt
# Files in the order of their folders: sorted by their number of tests, the longest ones would come last.
ON_TWO_CORES := -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: help install test test-slow test-newest constraints lint demo demo-model bench results gpu docs pictures clean

help:
	@echo "make install      everything into .venv, in the versions of constraints.txt"
	@echo "make demo         fine-tune a small model in one pass and in N passes, compare them (MODEL=… DATA=… for your own)"
	@echo "make demo-model   write a tiny model to out/demo-model: export MODEL=out/demo-model"
	@echo "make test         run the tests"
	@echo "make test-slow    the tests that take long; installs bitsandbytes and, on Linux, triton, which compiles for GPUs without one"
	@echo "make test-newest  run the tests with the newest releases of the package index, in .venv-newest"
	@echo "make constraints  do so, and write constraints.txt anew if they pass"
	@echo "make lint         ruff and mypy"
	@echo "make docs         build the site from docs/ into out/site"
	@echo "make pictures     draw the pictures of the docs"
	@echo "make bench        measure the step time of every mode and write it to benchmarks/results/"
	@echo "make results      measure again what is older than its code (ARGS=\"--data FOLDER --tokenizer PATH\")"
	@echo "make gpu          on a GPU: doctor, the tests that need one, and step times, in 25 minutes (run it again to go on)"

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PINNED) $(BIN)/pip install --quiet -e ".[dev,plot]"
	touch $@

# ARGS=… runs what it names in one process.
test: $(INSTALLED)
ifdef ARGS
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest $(ARGS)
else
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(ON_TWO_CORES)
endif

test-newest:
	$(PYTHON) -m venv --clear $(NEWEST)
	$(NEWEST)/bin/pip install --quiet -e ".[dev,plot]"
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(NEWEST)/bin/python -m pytest $(or $(ARGS),$(ON_TWO_CORES))

# The comment at its top stays. Left out: this package, what comes with Python, and what PyTorch's CUDA build pins itself.
constraints: test-newest
	{ grep '^#' constraints.txt; $(NEWEST)/bin/pip list --format=freeze \
	| sed -E '/^(trl-singlepass|pip|setuptools|triton|(nvidia|cuda)-.*)==/d; s/\+.*//'; } > $(NEWEST)/constraints.txt
	mv $(NEWEST)/constraints.txt constraints.txt

$(SLOW): $(INSTALLED)
	$(PINNED) $(BIN)/pip install --quiet 'triton>=3.4; sys_platform == "linux"' -e ".[quantization]"
	touch $@

test-slow: $(SLOW)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow $(ON_TWO_CORES)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The model and data of the demo, unless MODEL=… or DATA=… is given here: one that is exported for the docs stays out of it.
given = $(if $(filter command,$(origin $1)),$2 $($1))
demo: $(INSTALLED)
	$(BIN)/python -m demo $(call given,MODEL,--model) $(call given,DATA,--data) $(ARGS)

demo-model: $(INSTALLED)
	$(BIN)/trl-singlepass demo-model out/demo-model

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

pictures: $(INSTALLED)
	$(BIN)/python -m benchmarks.pictures

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.step_time $(ARGS)
	$(BIN)/python -m benchmarks.step_time --memory
	$(BIN)/python -m benchmarks.report

results: $(INSTALLED)
	$(BIN)/python -m benchmarks.freshness --run $(ARGS)

gpu: $(INSTALLED)
	$(BIN)/python -m benchmarks.gpu $(ARGS)

clean:
	rm -rf $(VENV) $(NEWEST) out
