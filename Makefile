# `make` lists what there is. Everything runs in .venv, which is set up on first use and again when
# pyproject.toml changes; after that nothing needs the network. Without make: see README.md.
SHELL = /bin/sh

# The first of these that is Python 3.11 to 3.13 is used: make PYTHON=/path/to/python3.12 reproduce
PYTHON ?= python3 python3.13 python3.12 python3.11 python
PY = .venv/bin/python
READY = .venv/.ready

help:
	@echo 'make reproduce   every notebook in the quick profile, and figures/ redrawn from the recorded runs'
	@echo 'make test        linter, formatter, type check, unit tests, doctests, programs and notebooks under test'
	@echo 'make lab         JupyterLab on the notebooks'
	@echo 'make figures     figures/ redrawn from the recorded runs'
	@echo 'make notebooks   for maintainers: execute in place the notebooks that a change affects'
	@echo 'make clean       remove build/ (unfinished runs too) and caches;  make distclean: .venv as well'

# Figures come first: they need no notebook, and the table of notebooks is then the last thing on screen.
reproduce: $(READY)
	@failed=0; \
	echo '== figures'; $(PY) -m sppkit figures || failed=1; \
	echo '== notebooks'; $(PY) notebooks/run.py --profile quick || failed=1; \
	test $$failed -eq 0 || echo 'make reproduce: something failed, see above'; \
	exit $$failed

test: $(READY)
	@failed=''; summary=''; \
	step() { \
	    name="$$1"; shift; begin=$$(date +%s); echo "== $$name"; \
	    if "$$@"; then result=ok; else result=FAILED; failed=yes; fi; \
	    summary="$$summary$$(printf '%-12s %-7s %5d s' "$$name" $$result $$(($$(date +%s) - begin)))|"; \
	}; \
	step linter $(PY) -m ruff check .; \
	step formatter $(PY) -m ruff format --check .; \
	step types $(PY) -m mypy sppkit notebooks/*.py notebooks/training data/experiments figures/draw.py; \
	step unit-tests $(PY) -m pytest -q -n 2 --dist loadfile -m 'not program'; \
	step programs $(PY) -m pytest -q -n 2 --dist loadfile -m program; \
	step notebooks $(PY) notebooks/run.py --profile quick; \
	echo '== summary'; printf '%s' "$$summary" | tr '|' '\n'; \
	test -z "$$failed"

lab: $(READY)
	$(PY) -m jupyterlab --ip=127.0.0.1 --notebook-dir=notebooks

figures: $(READY)
	$(PY) -m sppkit figures

notebooks: $(READY)
	$(PY) notebooks/run.py --profile quick --in-place

clean:
	rm -rf build dist sppkit.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find sppkit tests notebooks data figures -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
	find notebooks -name .ipynb_checkpoints -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean
	rm -rf .venv

$(READY): pyproject.toml
	@python=''; \
	for name in "$(PYTHON)" $(PYTHON); do \
	    if "$$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; \
	    then python="$$name"; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
	    echo 'sppkit needs Python 3.11, 3.12 or 3.13; none of these is one: $(PYTHON)'; \
	    echo 'Name yours: make PYTHON=/path/to/python3.12 reproduce'; exit 1; \
	fi; \
	if ! $(PY) -m pip --version >/dev/null 2>&1; then \
	    echo "Setting up .venv with $$("$$python" --version): about 5.5 GB on disk, a few minutes on first use"; \
	    "$$python" -m venv --clear .venv || { \
	        echo 'No virtual environment could be made (Debian and Ubuntu: apt install python3-venv)'; exit 1; }; \
	fi
	$(PY) -m pip install --quiet 'uv>=0.5,<1'
	$(PY) -m uv pip install --quiet --python $(PY) -e '.[notebooks,dev,export,race]'
	@touch $(READY)

.PHONY: help reproduce test lab figures notebooks clean distclean
