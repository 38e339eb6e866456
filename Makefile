# ddlib: `make help` lists the targets. Every path is relative, so any folder will do, one with spaces too.
PYTHON  ?= python3
PROFILE ?= smoke
ONLY    ?=

VENV  := .venv/bin/python
STAMP := .venv/.stamp
# A checksum, because a fresh clone has arbitrary times; with the folder's name, because the editable install keeps it.
SUM   := { pwd; cat pyproject.toml constraints.txt; } | cksum
NEW   := 'import sys; sys.exit(sys.version_info < (3, 11))'

.DEFAULT_GOAL := help
.PHONY: help env reproduce site test unit campaign compat lab bench gpu clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile
	@echo "  variables: PROFILE=smoke|small|paper, ONLY=<part of reproduce>, PYTHON=<the interpreter for .venv>, LOCKED=yes (hashes; Linux)"

# Without pip's own compiling: Python compiles what is imported when it is, and the install takes a minute less.
env: ## .venv with the pinned versions (PYTHON=python3); does nothing when it is up to date
	@[ -x $(VENV) ] && [ "$$($(SUM))" = "$$(cat $(STAMP) 2>/dev/null)" ] && exit 0; \
	if ! $(VENV) -c 'import pip' 2>/dev/null || ! $(VENV) -c $(NEW); then \
		if ! "$(PYTHON)" -c $(NEW) 2>/dev/null; then \
			found=$$("$(PYTHON)" -V 2>&1) || found="not a Python that runs"; \
			echo "make env: ddlib needs Python 3.11 or newer, but '$(PYTHON)' is $$found;" \
				"name another: make env PYTHON=python3.12" >&2; exit 1; \
		fi; \
		"$(PYTHON)" -m venv --clear .venv || exit 1; \
	fi; \
	rm -f $(STAMP); echo "Installing into .venv (the first time: some minutes, about 6 GB with CUDA)"; \
	if [ -n "$(LOCKED)" ]; then \
		$(VENV) -m pip install --quiet --no-compile --disable-pip-version-check --require-hashes -r requirements.lock && \
		$(VENV) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e . && $(SUM) > $(STAMP); \
	else \
		$(VENV) -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e '.[docs,lab,test]' && $(SUM) > $(STAMP); \
	fi

reproduce: env ## the tables and figures of PROFILE (smoke), or only a part of them: ONLY=...
	$(VENV) -m ddlib reproduce --profile $(PROFILE) $(if $(ONLY),--only $(ONLY))

site: env ## pages in site/ from what is stored: notebooks, claims, methods, kept sets, figures
	$(VENV) -m ddlib site

# Records go to a scratch folder: the notebooks are run for real, and results/ stays as it was. Two files at a time, each
# on one thread: on networks this small two threads wait for one another. The notebooks, which take longest, come first.
test: env ## the tests, and every notebook from top to bottom
	@scratch=$$(mktemp -d) || exit 1; trap 'rm -rf "$$scratch"' EXIT; trap 'exit 130' INT TERM; \
	DDLIB_RESULTS="$$scratch" OMP_NUM_THREADS=1 $(VENV) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder \
		--nbval-lax --nbval-current-env $(wildcard notebooks/*.ipynb) tests

unit: env ## the tests of the library alone: unit, oracles, contract
	@scratch=$$(mktemp -d) || exit 1; trap 'rm -rf "$$scratch"' EXIT; trap 'exit 130' INT TERM; \
	DDLIB_RESULTS="$$scratch" OMP_NUM_THREADS=1 $(VENV) -m pytest -q -n 2 --dist loadfile tests/unit tests/oracles tests/contract

campaign: env ## MINUTES=30 of kills, full disks, processes that meet, damaged files and odd arguments; counts in results/campaigns
	$(VENV) -m tests.campaigns --minutes $(or $(MINUTES),30)

compat: env ## oldest and newest torch on Python 3.11 to 3.13, each in an environment of its own; says which are missing
	$(VENV) tools/compat.py

lab: env ## JupyterLab, opened on the first notebook
	$(VENV) -m jupyterlab notebooks/start_here.ipynb

bench: env ## speed and memory against the plain loops
	$(VENV) -m benchmarks

gpu: env ## MINUTES=30 on a CUDA GPU: its tests, then the papers' rows, cheapest first; goes on where it stopped
	$(VENV) -m pytest -q -m gpu tests/unit tests/oracles tests/contract
	$(VENV) -m ddlib queue --device cuda --minutes $(or $(MINUTES),30)

clean: ## remove caches, site/ and smoke outputs; .venv and the kept results stay
	rm -rf site results/smoke results/notebooks/smoke figures/smoke .pytest_cache .ruff_cache build dist *.egg-info
	find . -name .venv -prune -o '(' -name __pycache__ -o -name .ipynb_checkpoints ')' -prune -exec rm -rf {} +
