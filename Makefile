# make demo      see MoCo learn, on the built-in images
# make test      run the tests
# make lint      check format and style
# make claims DATA=ROOT/cifar-10    the experiment M0 to M3: hours on a small machine
# make figures   draw img/ again from img/data/
# make clean     remove .venv and caches
#
# Each target creates .venv and installs what it needs; `make demo PYTHON=python3.12` chooses the
# interpreter.

PYTHON ?= python3
RUN := .venv/bin/python
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check
PROCESSES := $$(( $$(getconf _NPROCESSORS_ONLN) + 1 ))

.PHONY: demo test lint claims figures clean

demo: .venv/installed
	@start=$$(date +%s) && \
	$(RUN) train.py --preset demo --overwrite && \
	$(RUN) test.py --preset demo && \
	$(RUN) visualize.py --preset demo --report && \
	echo "demo     $$(( $$(date +%s) - start )) s; open output/SHAPES/figures/report.html"

test: .venv/installed-dev
	$(RUN) -m pytest -n $(PROCESSES) -o tmp_path_retention_policy=failed \
		-o tmp_path_retention_count=1

lint: .venv/installed-dev
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .

claims: .venv/installed
	@test -n "$(DATA)" || { \
		echo "error: make claims needs a data set: make claims DATA=ROOT/cifar-10" >&2; \
		exit 2; }
	@$(PIP) "scikit-learn>=1.4"  # for the map of the features
	$(RUN) benchmarks/claims.py $(DATA) --result_path img

figures: .venv/installed
	$(RUN) visualize.py --redraw --result_path img

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "error: Python 3.10 or newer is needed: make PYTHON=python3.12 ..." >&2; \
		exit 2; }
	@echo "installing into .venv (PyTorch is large: a few minutes, once)"
	@$(PYTHON) -m venv .venv
	@$(PIP) -r requirements.txt
	@touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	@$(PIP) -r requirements-dev.txt
	@touch $@

clean:
	rm -rf .venv .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
