# make smoke     every script at --preset tiny, in minutes
# make figures   every figure at its default preset, on embedded data
# make test      the test suite
# make paper     the published sizes, with downloads, and a report, into reproduction/; says first how long it takes; can
#                be stopped and continued

PYTHON ?= python3
SCRIPTS := $(shell grep -sl '^    cli\.main' *.py *-*/*.py)
OF_ALL_DATASETS = correlation.py teleport_sharpness_curvature.py
PAPER = --preset paper --output reproduction

.PHONY: help smoke figures test paper benchmark clean $(SCRIPTS:%=smoke/%) $(SCRIPTS:%=figures/%)

help:
	@sed -n '/^# /!q; s/^# //p' Makefile

# Two scripts at a time, each with half of the cores: one computes while the other, on one core, imports or draws.
AT_ONCE = $(MAKE) --no-print-directory -j 2 $(if $(filter output-sync,$(.FEATURES)),-O)
JOBS = $(shell expr \( $$(getconf _NPROCESSORS_ONLN) + 1 \) / 2)
RUN = @echo; echo "== $*"; .venv/bin/python $* --jobs $(JOBS)

smoke: .venv/installed
	+@$(AT_ONCE) $(SCRIPTS:%=smoke/%)

figures: .venv/installed
	+@$(AT_ONCE) $(SCRIPTS:%=figures/%)
	@echo; echo "The pictures are in figures/quick/, the numbers in results/quick/."

$(SCRIPTS:%=smoke/%): smoke/%:
	$(RUN) --preset tiny

$(SCRIPTS:%=figures/%): figures/%:
	$(RUN)

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

# Let .venv be of $(PYTHON)'s version and hold what a file requires. Copies in .venv tell what it was made with, and
# that it was made here: another one is not thrown away.
define install
@version='import sys; print("%d.%d" % sys.version_info[:2])'; \
wanted=$$($(PYTHON) -c "$$version") || wanted=missing; \
case $$wanted in 3.1[0-4]) ;; *) \
  echo "error: Python 3.10 to 3.14 is needed and $(PYTHON) is $$wanted: try make PYTHON=python3.12" >&2; exit 2;; \
esac; \
found=$$(.venv/bin/python -c "$$version" 2>/dev/null) || found=; \
if [ "$$found" != $$wanted ]; then \
  if [ "$$found" ] && [ ! -f .venv/requirements.txt ]; then \
    echo "error: .venv is of Python $$found, not $$wanted: remove it, or make PYTHON=python$$found" >&2; exit 2; \
  fi; \
  $(PYTHON) -m venv --clear .venv || exit; \
fi; \
changed=; \
for file in $(sort requirements.txt $(1)); do cmp -s $$file .venv/$$file || changed=yes; done; \
if [ "$$changed" ]; then \
  .venv/bin/python -m pip install --quiet -r $(1) && cp $(sort requirements.txt $(1)) .venv; \
fi
endef

.PHONY: .venv/installed .venv/installed-dev

.venv/installed:
	$(call install,requirements.txt)

.venv/installed-dev:
	$(call install,requirements-dev.txt)

clean:
	rm -rf figures/tiny figures/quick results/tiny results/quick
