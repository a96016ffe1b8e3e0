# make demo: install and train on a small data set that needs no download.
# make test: the tests that need no torch; test-fast: the two-minute part; test-long:
# what takes minutes: several processes, many faults, all recipes, the largest networks.
# make test-oracles: against torchvision, timm, Keras, TensorFlow and the TPU compiler.
# make slurm: what the tests of launch/slurm.sbatch take; as root, on Debian or Ubuntu.

PYTHON ?= python3
VENV ?= .venv
ORACLES ?= .venv-oracles
DEMO ?= runs/quickstart
# Three at a time on two cores, since some only wait.
PYTEST = -m pytest -q -n 3 --dist worksteal
# Large pages: the tests that draw hundreds of networks take half the time.
export GLIBC_TUNABLES = glibc.malloc.hugetlb=1

.PHONY: demo test test-fast test-long test-oracles lint slurm

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
		tests/test_prepare.py::test_tfrecords_become_arrayrecord

lint: $(VENV)/.installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

slurm:
	apt-get install -y --no-install-recommends slurm-wlm munge

$(VENV)/.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q -r requirements.txt
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed requirements-test.txt requirements-cloud.txt
	$(VENV)/bin/pip install -q -r requirements-test.txt
	touch $@

$(ORACLES)/.installed: $(wildcard requirements*.txt)
	$(PYTHON) -m venv $(ORACLES)
	$(ORACLES)/bin/pip install -q -r requirements-oracles.txt
	touch $@
