# Two commands do everything on a fresh machine: `make demo` and `make test`. Each makes .venv where there is none.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --constraint constraints.txt --editable

.PHONY: help demo test test-slow format docs changes clean
# Two installs into one environment must not run at once.
.NOTPARALLEL:

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(VENV)/.demo ## prune a small trained network and write the result to demo-out/
	$(BIN)/secateurs demo --out demo-out

test: $(VENV)/.dev ## lint, types, import rules and all tests but the slow ones
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/pytest -q --numprocesses=auto --maxprocesses=4 --dist=loadfile

test-slow: $(VENV)/.dev ## the slow tests alone
	$(BIN)/pytest -q -m slow

format: $(VENV)/.dev ## mend layout and import order
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: $(VENV)/.dev ## the generated pages of docs/, from the catalogue and the benchmark results
	$(BIN)/python -m tools.docs

changes: ## the next release's section of CHANGELOG.md, from changes/
	@for kind in added changed fixed removed; do \
	  for file in changes/*.$$kind.md; do \
	    if [ -e "$$file" ]; then [ "$$last" = "$$kind" ] || printf '\n### %s\n\n' "$$kind"; last=$$kind; cat "$$file"; fi; \
	  done; \
	done

clean: ## remove the environment, caches and demo-out/
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache demo-out

# The stamps carry the time of the last install: a changed requirement installs again, an unchanged one costs nothing.
# pip is the last thing that venv writes, so an interrupted venv is made anew.
$(BIN)/pip:
	$(PYTHON) -m venv --clear $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/pip
	$(INSTALL) '.[demo]'
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/pip
	$(INSTALL) '.[dev]'
	touch $(VENV)/.demo $@
