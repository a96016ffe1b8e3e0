# make demo: install and train on a small data set that needs no download.
# make test: the tests that need no torch; test-fast: the two-minute part; test-long:
# what takes minutes: several processes, many faults, all recipes, the largest networks.
# make test-oracles: against torchvision, timm, Keras, TensorFlow and the TPU compiler.
# make test-latest: the tests with the newest releases, in an environment of its own.
# make test-wheel: the built package, in an empty environment and an empty directory.
# make docs: the documentation's site in build/site; a dead link is an error.
# make slurm: installs what the tests of launch/slurm.sbatch need; as root, on Debian or
# Ubuntu.

PYTHON ?= python3
VENV ?= .venv
ORACLES ?= .venv-oracles
LATEST ?= .venv-latest
DEMO ?= runs/quickstart
# Three at a time on two cores, since some only wait.
PYTEST = -m pytest -q -n 3 --dist worksteal
# The versions that were tested with this version of Python.
VERSION = $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
TESTED = $(wildcard tests/constraints/$(VERSION).txt)
INSTALL = pip install -q $(addprefix -c ,$(TESTED))
# Large pages: the tests that draw hundreds of networks take half the time.
export GLIBC_TUNABLES = glibc.malloc.hugetlb=1

.PHONY: demo test test-fast test-long test-oracles test-latest test-wheel lint docs slurm

demo: $(VENV)/.installed
	$(VENV)/bin/python -m resnet_jax.main --config=configs/quickstart.py --workdir=$(DEMO)
	@echo "The report of the run: $(DEMO)/report.png"

test: $(VENV)/.installed-test
	$(VENV)/bin/python $(PYTEST) --ignore=tests/oracles -m "not long"

test-fast: $(VENV)/.installed-test
	$(VENV)/bin/python $(PYTEST) --ignore=tests/oracles -m "not slow and not long"

test-long: $(VENV)/.installed-test
	$(VENV)/bin/python $(PYTEST) --ignore=tests/oracles -m long

test-oracles: $(ORACLES)/.installed
	$(ORACLES)/bin/python $(PYTEST) tests/oracles tests/plan/test_tpu.py \
		tests/data/prepare/test_builders.py::test_tfrecords_become_arrayrecord

test-latest:
	$(PYTHON) -m venv $(LATEST)
	$(LATEST)/bin/pip install -q --upgrade --upgrade-strategy eager -e '.[test]'
	$(LATEST)/bin/python $(PYTEST) --ignore=tests/oracles -m "not long"

test-wheel:
	tests/wheel.sh $(PYTHON) $(TESTED)

lint: $(VENV)/.installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports --no-logo
	$(VENV)/bin/mypy

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet
	@echo "The site is in build/site. To read and search it in a browser:"
	@echo "$(PYTHON) -m http.server --bind 127.0.0.1 --directory build/site"

slurm:
	apt-get install -y --no-install-recommends slurm-wlm munge

$(VENV)/.installed: requirements.txt pyproject.toml $(TESTED)
	$(PYTHON) -m venv $(VENV)
	$(untested)
	$(VENV)/bin/$(INSTALL) -e .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(VENV)/bin/$(INSTALL) -e '.[test]'
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(VENV)/bin/$(INSTALL) -e '.[docs]'
	touch $@

$(ORACLES)/.installed: requirements.txt pyproject.toml $(TESTED)
	$(PYTHON) -m venv $(ORACLES)
	$(untested)
	$(ORACLES)/bin/$(INSTALL) -e '.[oracles]'
	touch $@

# A warning, unless this version of Python has been tested.
define untested
	$(if $(TESTED),,@echo "Python $(VERSION) has no file in tests/constraints/: the\
	 newest releases are installed, which nobody has tested with it.")
endef
