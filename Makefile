# Each target installs what it needs into .venv first. Extra arguments: make demo ARGS="--json"
PYTHON ?= python3
ARGS ?=

VENV := .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-all lint bench tiny

demo: $(INSTALLED)
	$(VENV)/bin/leapalign demo $(ARGS)

# A process for each core, with one thread each: two threads in one process would wait for each other most of the time.
# `test-all` has those that are marked slow, too.
test-all: ALL := -m ""
test test-all: $(INSTALLED)
	OMP_NUM_THREADS=1 $(VENV)/bin/pytest --numprocesses=auto --dist=loadfile $(ALL) $(ARGS)

lint: $(INSTALLED)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

bench: $(INSTALLED)
	$(PY) -m leap_kernels bench $(ARGS)

tiny: $(INSTALLED)
	$(PY) -m leapalign.tiny.train $(ARGS)

$(PY):
	$(PYTHON) -m venv $(VENV)

# The order-only dependency keeps a newer interpreter from forcing a reinstall.
SOURCES := pyproject.toml constraints.txt CMakeLists.txt $(wildcard kernels/*.t*) $(wildcard kernels/native/*)
# --no-compile: Python does so when it imports a module, and few of all those are.
# The kernels by themselves: leapalign's own copy would not follow the sources, and compiles for as long again.
$(INSTALLED): $(SOURCES) | $(PY)
	SKBUILD_CMAKE_DEFINE=LEAP_BUNDLE=OFF $(PY) -m pip install --no-compile -e ./kernels -e '.[dev]' -c constraints.txt
	touch $@
