# Every target makes the .venv that it needs; PYTHON=python3.12 make test chooses the interpreter it is made with.
PYTHON ?= python3
VENV := .venv/bin/python
CORE := .venv/.installed
DEV := .venv/.installed-dev
SLOW := -m slow -n 0 -o faulthandler_timeout=3600

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-slow test-kill fuzz lint bench clean

help:           ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1|/p' $(MAKEFILE_LIST) | while IFS='|' read -r name text; do printf '  make %-10s %s\n' "$$name" "$$text"; done

venv: $(DEV)     ## .venv with all packages: requirements-dev.txt, which includes requirements.txt

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

demo: $(CORE)  ## train a small model on Python's standard library, and let it write: about five minutes
	rm -rf runs/demo
	$(VENV) train_trm_lm.py --config configs/demo.yaml --save_dir runs/demo
	$(VENV) generate.py runs/demo --prompt "def main(" "class Reader:" --max_new_tokens 150 --seed 1

test: $(DEV)  ## the tests: some minutes
	$(VENV) -m pytest

test-slow: $(DEV)  ## the tests that take longer
	$(VENV) -m pytest $(SLOW)

test-kill: $(DEV)  ## kill a run 25 times, tokenized and streaming: about ten minutes
	$(VENV) -m pytest $(SLOW) tests/training/test_kill.py

fuzz: $(DEV)    ## broken files to everything that reads files: make fuzz N=100000
	$(VENV) tests/fuzz/fuzz.py $(or $(N),10000)

lint: $(DEV)  ## ruff: mistakes and format
	$(VENV) -m ruff check .
	$(VENV) -m ruff format --check .

bench: $(DEV)  ## speed and memory: a table and one JSON line each
	$(VENV) benchmarks/bench_train.py
	$(VENV) benchmarks/bench_generate.py
	$(VENV) benchmarks/bench_load.py
	$(VENV) benchmarks/bench_memory.py
	$(VENV) benchmarks/bench_data.py
	$(VENV) benchmarks/bench_engine.py

clean:          ## remove caches and the demo run; .venv, data and other runs stay
	rm -rf runs/demo .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
