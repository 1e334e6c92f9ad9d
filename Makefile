# Both `make book` and `make test` create .venv once and reuse it.
# Inside an environment of your own: make book PYTHON=python VENV=
PYTHON ?= python3
VENV ?= .venv
HTML := book/_build/html

ifeq ($(strip $(VENV)),)
RUN := "$(PYTHON)"
READY :=
else
RUN := "$(VENV)/bin/python"
empty :=
READY := $(subst $(empty) ,\ ,$(VENV))/.ready
endif

.PHONY: help book test bench lock clean

help:
	@echo "make book    build the book (the last line says which file to open)"
	@echo "make test    lint, type-check and test"
	@echo "make bench   time the attacks and the engine beside other libraries (some ten minutes)"
	@echo "make lock    resolve requirements.lock anew from pyproject.toml (needs uv)"
	@echo "make clean   remove the built book"

ifneq ($(READY),)
$(READY): requirements.lock pyproject.toml
	@"$(PYTHON)" -c "import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14) and 'Python 3.11 to 3.13 is needed, ' + sys.executable + ' is ' + sys.version)"
	"$(PYTHON)" -m venv "$(VENV)"
	@echo "installing exact versions from requirements.lock: some 7 GB on Linux, most of it PyTorch"
	$(RUN) -m pip install --quiet --no-deps --requirement requirements.lock
	$(RUN) -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch "$(VENV)/.ready"
endif

# Pages and tests compute many small things, which one thread does faster than several that wait for each other.
book test: export OMP_NUM_THREADS ?= 1
# Where Matplotlib lists the fonts once, which no page must show: a home needn't be writable.
book: export MPLCONFIGDIR := $(CURDIR)/book/_build/matplotlib
book: $(READY)
	$(RUN) -c "import matplotlib.pyplot"
	$(RUN) tests/execute_book.py book
	$(RUN) -c "from jupyter_book.cli.main import main; main()" build book --all --warningiserror --keep-going --nitpick
	$(RUN) tests/scan_book.py $(HTML)
	@echo "The book is built. Open $(CURDIR)/$(HTML)/index.html"

test: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(RUN) -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

bench: $(READY)
	$(RUN) tests/bench_attacks.py

lock:
	uv pip compile --universal --fork-strategy fewest --python-version 3.11 --extra book --extra test --extra bench --quiet pyproject.toml --output-file requirements.lock

clean:
	rm -rf book/_build
