# `make demo` and `make test` work on a machine with nothing but Python (3.11 or newer) and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SLOW := $(VENV)/.slow
# Files in the order of their folders: sorted by their number of tests, the longest ones would come last.
ON_TWO_CORES := -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: help install test test-slow lint demo demo-model bench results gpu docs pictures clean

help:
	@echo "make install      everything into .venv"
	@echo "make demo         fine-tune a small model in one pass and in N passes, compare them (MODEL=… DATA=… for your own)"
	@echo "make demo-model   write a tiny model to out/demo-model: export MODEL=out/demo-model"
	@echo "make test         run the tests"
	@echo "make test-slow    the tests that take long; installs bitsandbytes and, on Linux, triton, which compiles for GPUs without one"
	@echo "make lint         ruff and mypy"
	@echo "make docs         build the site from docs/ into out/site"
	@echo "make pictures     draw the pictures of the docs"
	@echo "make bench        measure the step time of every mode and write it to benchmarks/results/"
	@echo "make results      measure again what is older than its code (ARGS=\"--data FOLDER --tokenizer PATH\")"
	@echo "make gpu          on a GPU: doctor, the tests that need one, and step times, in 25 minutes (run it again to go on)"

install: $(INSTALLED)

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -e ".[dev,plot]"
	touch $@

# ARGS=… runs what it names in one process.
test: $(INSTALLED)
ifdef ARGS
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest $(ARGS)
else
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(ON_TWO_CORES)
endif

$(SLOW): $(INSTALLED)
	$(BIN)/pip install --quiet 'triton>=3.4; sys_platform == "linux"' -e ".[quantization]"
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
	rm -rf $(VENV) out
