# make demo: set everything up and run the whole path.   make test: set everything up and test it.

PYTHON ?= python3
BIN := .venv/bin
OLDEST := .venv-oldest
OLDEST_TRANSFORMERS := 5.17.0
# With the oldest torch, too, which brings some GB for GPUs: make clean test-oldest OLDEST_TORCH=2.11.0
OLDEST_TORCH ?= $(shell sed -n 's/^torch==//p' constraints.txt)
VLLM := .venv-vllm

# Workers of the test run; each one computes on a single thread.
JOBS ?= 2
PYTEST := env OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: setup assets demo test lint test-oldest test-vllm clean

setup: .venv/ready

# torch first and exact: resolved together with the rest, a newer build of several GB may be chosen.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $$(grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

assets: setup
	$(BIN)/kvloom fetch

demo: assets
	$(BIN)/kvloom demo

# Triton's kernels are interpreted, which is set for a whole process before triton is imported.
test: assets
	$(PYTEST) -n $(JOBS)
	TRITON_INTERPRET=1 $(PYTEST) -n $(JOBS) tests/kernels/test_triton.py tests/cache/test_eviction_triton.py

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# What touches transformers most, on the oldest transformers that pyproject.toml allows.
test-oldest: $(OLDEST)/ready assets
	env OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n $(JOBS) tests/cache tests/kernels

$(OLDEST)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(OLDEST)
	grep -vE '^(torch|transformers|tokenizers|huggingface_hub|cuda-.*|nvidia-.*)==' constraints.txt > $(OLDEST)/constraints.txt
	printf '%s\n' torch==$(OLDEST_TORCH) transformers==$(OLDEST_TRANSFORMERS) >> $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --quiet torch==$(OLDEST_TORCH)
	$(OLDEST)/bin/python -m pip install --quiet -c $(OLDEST)/constraints.txt -e '.[test]'
	touch $@

# vLLM asks for another transformers and for one torch; a processor is enough.
test-vllm: $(VLLM)/ready assets
	env OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest tests/integrations/test_vllm.py tests/integrations/test_vllm_prompts.py

$(VLLM)/ready: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --no-deps -r constraints-vllm.txt
	$(VLLM)/bin/python -m pip install --quiet --no-deps -e .
	touch $@

clean:
	rm -rf .venv $(OLDEST) $(VLLM)
