# make smoke     every script at --preset tiny, in minutes
# make figures   every figure at its default preset, on embedded data
# make test      the test suite
# make paper     the published sizes, with downloads, and a report, into reproduction/; says first how long it takes; can
#                be stopped and continued

PYTHON ?= python3
SCRIPTS = $(shell grep -l '^    cli\.main' *.py *-*/*.py)
OF_ALL_DATASETS = correlation.py teleport_sharpness_curvature.py
PAPER = --preset paper --output reproduction

.PHONY: help smoke figures test paper benchmark clean

help:
	@grep '^# ' Makefile | cut -c3-

smoke: .venv/installed
	@set -e; for script in $(SCRIPTS); do echo; echo "== $$script"; .venv/bin/python $$script --preset tiny; done

figures: .venv/installed
	@set -e; for script in $(SCRIPTS); do echo; echo "== $$script"; .venv/bin/python $$script; done
	@echo; echo "The pictures are in figures/quick/, the numbers in results/quick/."

test: .venv/installed-dev
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n auto

paper: .venv/installed
	@.venv/bin/python report.py --estimate
	.venv/bin/python init_directory.py --download MNIST FashionMNIST CIFAR10
	@set -e; for script in $(filter-out $(OF_ALL_DATASETS),$(SCRIPTS)); do \
	  echo; echo "== $$script"; .venv/bin/python $$script $(PAPER); done
	@set -e; for script in $(OF_ALL_DATASETS); do \
	  echo; echo "== $$script"; .venv/bin/python $$script $(PAPER) --dataset all; done
	.venv/bin/python report.py --root reproduction

benchmark: .venv/installed
	.venv/bin/python benchmarks/benchmark.py

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: requirements.txt | .venv/bin/python
	.venv/bin/python -m pip install --quiet -r requirements.txt
	@touch $@

.venv/installed-dev: requirements-dev.txt requirements.txt | .venv/bin/python
	.venv/bin/python -m pip install --quiet -r requirements-dev.txt
	@touch $@ .venv/installed

clean:
	rm -rf figures/tiny figures/quick results/tiny results/quick
