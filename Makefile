# Two commands do everything on a machine with python3 >= 3.11, g++ and make: `make demo` and `make test`.
# Both make the environment in .venv and compile the extension first; both are safe to repeat, and quick then.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/pip --disable-pip-version-check

EXTRAS  := recommender,bench,test,dev
SOURCES := $(shell find csrc build_backend -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' -o -name '*.py')
FOLDERS := $(shell find csrc -type d)
# Each tier in a process of its own: the dispatch is decided once per process.
OP_TESTS := tests

.PHONY: help env build test lint sanitize demo clean
.DELETE_ON_ERROR:

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

# Torch and the build tools first: the extension is compiled against this torch, not against one that pip would
# fetch for an isolated build.
$(VENV)/tools: constraints.txt
	@echo "== environment: torch and build tools into $(VENV) (a minute or two the first time)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "attnrec needs Python 3.11 or newer; this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt torch numpy 'setuptools>=77' wheel ninja
	@touch $@

build/extension: $(VENV)/tools setup.py $(SOURCES) $(FOLDERS)
	@echo "== extension: compiling what changed"
	$(BIN)/python setup.py -q build_ext --inplace
	@mkdir -p build && touch $@

build: build/extension ## compile attnrec/_C in place; only what changed

$(VENV)/installed: build/extension pyproject.toml constraints.txt
	@echo "== environment: attnrec (editable) and its extras"
	$(PIP) install -q -c constraints.txt --no-build-isolation -e '.[$(EXTRAS)]'
	@touch $@

env: $(VENV)/installed ## the whole environment, extension included

clean: ## remove what the build made; the environment stays
	rm -rf build dist attnrec.egg-info attnrec/_C*.so
