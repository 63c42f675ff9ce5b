# make demo      see MoCo learn, on the built-in data       make claims DATA=ROOT/fashion-mnist   the experiment M0 to M3: about two hours on two cores
# make figures   redraw img/ from img/data/                 make test                             run the tests
# Each creates .venv and installs what it needs; `make demo PYTHON=python3.12` chooses the interpreter.

PYTHON ?= python3
BIN := .venv/bin
RUN := $(BIN)/python

.PHONY: demo claims figures test clean

demo: .venv/installed
	@start=$$(date +%s) && \
	$(RUN) train.py --preset demo --overwrite && \
	$(RUN) test.py --preset demo && \
	$(RUN) test.py --preset demo --encoder random && \
	$(RUN) visualize.py --preset demo && \
	echo "demo     $$(( $$(date +%s) - start )) s without the installation"

claims: .venv/installed
	@test -n "$(DATA)" || { echo "error: make claims needs Fashion-MNIST: make claims DATA=ROOT/fashion-mnist" >&2; exit 2; }
	@$(RUN) -m pip install --quiet --disable-pip-version-check "scikit-learn>=1.4"  # for the map of the features
	$(RUN) benchmarks/claims.py $(DATA)

figures: .venv/installed
	$(RUN) visualize.py --redraw

test: .venv/installed-dev
	$(RUN) -m pytest -n $$(( $$(getconf _NPROCESSORS_ONLN) + 1 )) -o tmp_path_retention_policy=failed -o tmp_path_retention_count=1

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: Python 3.10 or newer is needed: make PYTHON=python3.12 ..." >&2; exit 2; }
	@echo "installing into .venv (PyTorch is large: a few minutes, once)"
	@$(PYTHON) -m venv .venv
	@$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	@$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

clean:
	rm -rf .venv .pytest_cache __pycache__ tests/__pycache__
