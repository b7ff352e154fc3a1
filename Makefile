# Every target first creates the virtual environment .venv that it needs. PYTHON selects the interpreter for a new one:
# PYTHON=python3.12 make test
PYTHON ?= python3
VENV := .venv/bin/python
CORE := .venv/.installed
DEV := .venv/.installed-dev
SLOW := -m slow -n 0 -o faulthandler_timeout=3600

.DEFAULT_GOAL := help
.PHONY: help venv demo puzzles depth test test-slow test-kill fuzz lint bench clean

help:           ## list these targets
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1|/p' $(MAKEFILE_LIST) | while IFS='|' read -r name text; do printf '  make %-10s %s\n' "$$name" "$$text"; done

venv: $(DEV)     ## create .venv with all packages, those for the tests included

$(CORE): requirements.txt
	@$(call install,requirements.txt)
	@touch $@

$(DEV): requirements.txt requirements-dev.txt
	@$(call install,requirements-dev.txt)
	@touch $(CORE) $@

define install
echo "installing $(1) into .venv: a minute or two" >&2
test -x $(VENV) || $(PYTHON) -m venv .venv
$(VENV) -m pip install --quiet --disable-pip-version-check -r $(1)
endef

demo: $(CORE)  ## train a small model on Python's standard library and generate text with it (about 5 minutes)
	rm -rf runs/demo
	$(VENV) train_trm_lm.py --config configs/demo.yaml --save_dir runs/demo
	$(VENV) generate.py runs/demo --prompt "def main(" "class Reader:" --max_new_tokens 150 --temperature 0.6 --seed 1

puzzles: $(CORE)  ## train a solver of 4 x 4 Sudoku that improves from step to step, draw how it solves one (about 5 minutes)
	rm -rf runs/sudoku4
	$(VENV) train_puzzles.py --config configs/sudoku4.yaml
	$(VENV) solve_puzzles.py runs/sudoku4 --board 3....2....4..1.. --trace runs/sudoku4/board.png

depth: $(CORE)  ## train a loop on 4 sequential steps and run it on 28, beside plain transformers (5 minutes; FAMILY=all: all tasks)
	$(VENV) experiments/depth.py --family $(or $(FAMILY),carries)

test: $(DEV)  ## run the tests (a few minutes)
	$(VENV) -m pytest

test-slow: $(DEV)  ## run the tests that are marked slow
	$(VENV) -m pytest $(SLOW)

test-kill: $(DEV)  ## kill and resume a training run 25 times, tokenized and streaming (about 10 minutes)
	$(VENV) -m pytest $(SLOW) tests/training/test_kill.py

fuzz: $(DEV)    ## feed broken files to everything that reads files; more of them with make fuzz N=100000
	$(VENV) tests/fuzz/fuzz.py $(or $(N),10000)

lint: $(DEV)  ## check the code and its format with ruff
	$(VENV) -m ruff check .
	$(VENV) -m ruff format --check .

bench: $(DEV)  ## measure speed and memory; each benchmark prints tables and one JSON line
	$(VENV) benchmarks/bench_train.py
	$(VENV) benchmarks/bench_generate.py
	$(VENV) benchmarks/bench_load.py
	$(VENV) benchmarks/bench_memory.py
	$(VENV) benchmarks/bench_data.py
	$(VENV) benchmarks/bench_engine.py
	$(VENV) benchmarks/bench_puzzles.py
	$(VENV) benchmarks/bench_rag.py
	$(VENV) benchmarks/bench_serve.py

clean:          ## remove caches and the runs of demo and puzzles; keep .venv, data and other runs
	rm -rf runs/demo runs/sudoku4 .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
