# make demo     the plain install classifies two photos; then torch (about 2 minutes, once) and a fit of a minute
# make install  everything that tests, checks and documentation need (about 3 minutes more)
# make test     all tests           make check   style, types, import rules and the installs without torch
# make docs     the pictures, tables and transcripts of README.md and docs/, and the site, build/site/index.html
# make oldest   tests with the oldest versions of everything that pyproject.toml allows (another 9 GB)
# make drills   short fault-injection drills: kills, bad input, load, full disks (two minutes; docs/reliability.md)
# make bench    the benchmarks, on this machine (about a quarter of an hour; it should be otherwise idle)
#
# Targets do nothing if nothing has changed, and an interrupted one continues where it stopped.

PYTHON ?= $(shell command -v python3.11 || command -v python3 || echo python3)
# Less output in CI.
QUIET = $(if $(CI),-q)
PIP = -m pip install --disable-pip-version-check -c constraints.txt $(QUIET)
SETUP = pyproject.toml constraints.txt
# Installation compiles native/; this rule recompiles it after changes. EFFNET_BUILD: see CONTRIBUTING.md.
KERNELS = src/effnet/_kernels.$(if $(filter Darwin,$(shell uname)),dylib,so)
# One thread per test process: two processes with two threads each would compete for two cores. If a test uses two, the
# passive wait policy frees the core of a waiting thread. Bytecode is written, so that test processes compile only once.
TEST = PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive .venv/bin/python -m pytest -n auto $(QUIET)

# Tests that do not compare with other libraries, whose pinned versions need newer packages. Warnings are not errors
# here: old packages warn about each other.
OLDEST = tests/test_formats.py tests/arch/test_cost.py tests/arch/test_memory.py tests/runtime/test_session.py \
	tests/runtime/test_native.py tests/runtime/test_program_file.py tests/exporting/test_export.py \
	tests/training/test_train.py tests/serving/test_app.py tests/searching/test_search.py

.PHONY: help demo install test check docs oldest drills bench clean
help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -9

demo: .venv/.plain $(KERNELS)
	@[ -f $(KERNELS) ] || { echo "effnet has no engine of its own here, so torch will answer."; $(MAKE) --no-print-directory .venv/.demo; }
	@.venv/bin/effnet predict src/effnet/data/photos --topk 3
	@echo
	@[ ! -f $(KERNELS) ] || echo "That needs nothing but pip install effnet: no torch, no other engine. Training needs torch."
	@$(MAKE) --no-print-directory .venv/.demo
	.venv/bin/effnet fit examples/fashion --macs 100M --minutes 1
	@echo "The report: $(CURDIR)/runs/fit/latest/report.html"
	@echo
	@echo "Lite0 is B0 without squeeze-and-excitation and with ReLU6 in place of SiLU; its weights are installed with"
	@echo "effnet. B0's own weights come from the internet: .venv/bin/effnet predict PHOTO --model b0"

install: .venv/.dev $(KERNELS)

test: install
	$(TEST) $(ARGS)

check: install .venv-plain/.made .venv-openvino/.made .venv-onnx/.made
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/python -m pytest -q tests/test_imports.py
	.venv/bin/python tests/support/sanitized.py
	.venv-plain/bin/python tests/support/plain_install.py
	.venv-plain/bin/effnet info b0 >/dev/null
	.venv/bin/effnet export lite0 --format openvino --out .venv-openvino/lite0
	.venv-openvino/bin/python tests/support/engine_install.py .venv-openvino/lite0
	.venv/bin/effnet export lite0 --format onnx --out .venv-onnx/lite0.onnx
	.venv-onnx/bin/python tests/support/engine_install.py .venv-onnx/lite0.onnx

docs: install
	.venv/bin/python docs/draw.py
	.venv/bin/python docs/transcripts.py
	.venv/bin/python -m sphinx -W --keep-going -q -b html docs build/site
	@echo "The site: $(CURDIR)/build/site/index.html"

oldest: .venv-oldest/.made
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -q -W default $(OLDEST)

drills: install
	@for drill in $(filter-out drills/verdict.py,$(wildcard drills/*.py)); do .venv/bin/python $$drill --short || exit 1; done

bench: install
	.venv/bin/python benchmarks/networks.py
	.venv/bin/python benchmarks/scaling.py
	.venv/bin/python benchmarks/times.py
	.venv/bin/python benchmarks/paper.py
	.venv/bin/python benchmarks/memory.py plans
	.venv/bin/python benchmarks/memory.py forecast
	.venv/bin/python benchmarks/memory.py large
	.venv/bin/python benchmarks/precision.py

clean:
	rm -rf .venv .venv-plain .venv-openvino .venv-onnx .venv-oldest build $(KERNELS) .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(KERNELS): native/build.py $(wildcard native/*.cpp native/*.h) | .venv/.made
	@.venv/bin/python native/build.py --if-possible

# An environment without its marker file was interrupted, so it is made anew.
# .venv-plain has no extras; .venv-openvino and .venv-onnx have only the extra of their name, and no torch.
.venv/.made .venv-plain/.made .venv-openvino/.made .venv-onnx/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "effnet needs Python 3.11 or newer; $(PYTHON) is older. Try: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; exit 1; }
	@echo "Making $(@D) with $(PYTHON)"
	@$(PYTHON) -m venv --clear $(@D)
	@$(if $(findstring -,$(@D)),$(@D)/bin/python $(PIP) -q -e '.$(patsubst .venv-%,[%],$(filter-out .venv-plain,$(@D)))')
	@touch $@

# Without constraints.txt, which pins the newest pair of torch and torchvision.
.venv-oldest/.made: constraints-oldest.txt pyproject.toml
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/python -m pip install -q -c constraints-oldest.txt -e '.[all]' httpx hypothesis pytest pytest-timeout tensorboard
	@touch $@

# Compiles only the kernels for this processor before the first answer; the others follow in .demo.
.venv/.plain: .venv/.made $(SETUP)
	@echo "Installing effnet and compiling its kernels: pip install -c constraints.txt -e ."
	@EFFNET_ISAS=host .venv/bin/python $(PIP) -q -e .
	@touch $@

.venv/.demo: .venv/.plain $(SETUP)
	@echo "Installing torch and Lightning: pip install -c constraints.txt -e '.[train]'"
	@.venv/bin/python $(PIP) -e '.[train]'
	@touch $@

.venv/.dev: .venv/.made $(SETUP)
	@echo "Installing what tests and checks need: pip install -c constraints.txt -e '.[dev]'"
	@.venv/bin/python $(PIP) -e '.[dev]'
	@touch .venv/.plain .venv/.demo $@
