# `make demo` runs the whole job on the embedded digits, with the flags in
# FLAGS if any; `make test` runs lint and tests. Both make their own virtual
# environment first.

PYTHON ?= $(shell for v in python3.13 python3.12 python3.11 python3; do \
	$$v -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& echo $$v && break; done)
WORKDIR ?= workdir/digits
FLAGS ?=

.PHONY: demo test lint clean

demo: .venv/done
	.venv/bin/python main.py --config=configs/digits.py --workdir=$(WORKDIR) \
	  $(FLAGS)

test: lint
	.venv-dev/bin/python -m pytest --numprocesses=auto --maxprocesses=4 \
	  --dist=worksteal

lint: .venv-dev/done
	.venv-dev/bin/ruff check .
	.venv-dev/bin/ruff format --check .

.venv/done: requirements.txt
.venv-dev/done: requirements.txt requirements-dev.txt

.venv/done .venv-dev/done:
	@test -n "$(PYTHON)" || { echo 'error: wanted Python 3.11 or newer,' \
	  'found none; install one or say make PYTHON=/path/to/python'; exit 1; }
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --upgrade pip
	$(@D)/bin/python -m pip install --quiet -r $(lastword $^)
	touch $@

clean:
	rm -rf .venv .venv-dev
