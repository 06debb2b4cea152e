# Needs Python 3.10 or newer with venv, make and a package index; everything else goes into $(VENV).
# PIP_FLAGS go to every pip install. Where your package index keeps torch's CPU build apart from its CUDA build, name the
# place here: make PIP_FLAGS="--extra-index-url URL"

PYTHON ?= python3
VENV ?= .venv
PIP_FLAGS ?=
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt
SOURCES := nncf_compactprune tests examples tools

# NNCF compiles a small extension at first use and gives up after 60 s; a slow machine takes longer.
export NNCF_EXTENSION_LOAD_TIMEOUT := 0
# By default torch's threads spin while they wait for each other. On two cores that other processes use too, an epoch of
# the demo took 20 to 90 s that way, and 5 to 12 s with threads that sleep.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test test-main test-floors test-nncf219 test-optimum test-executorch test-all lint docs docs-serve bench bench-deps dist clean
.DEFAULT_GOAL := demo

demo: $(VENV)/.installed ## Trains, prunes, fine-tunes and exports a network for handwritten digits: a few minutes.
	$(BIN)/nncf-compactprune run configs/digits_fbnet.json

test: lint test-floors test-nncf219 test-optimum test-executorch test-main ## The checks every change must pass.

test-main: $(VENV)/.installed-dev ## The tests, with the versions of constraints.txt.
	$(BIN)/python -m pytest -n 2

# What meets torch, NNCF, typer and their kin directly; `make test-floors FLOORS=tests` runs the other rooms, too.
FLOORS ?= tests/config tests/cut/test_surgery.py tests/decide tests/export tests/host tests/plugins tests/storage \
	tests/test_cli.py tests/test_controller.py tests/test_controller_rate.py

# Old packages meet a newer Python and newer packages of their own: their warnings are no errors here.
test-floors: $(VENV)-floors/.installed ## The tests of what needs no optional package, with the oldest versions allowed.
	$(VENV)-floors/bin/python -m pytest -n 2 -o filterwarnings=default --ignore tests/test_examples.py \
		--ignore tests/docs --ignore tests/test_bench.py $(FLOORS)

# NNCF 2.19's own algorithms trace by replacing torch's functions, which the variable asks for.
test-nncf219: ## The tests of what NNCF 2.19 does with this package; skipped, with a line, where it cannot be installed.
	@if $(MAKE) --no-print-directory $(VENV)-nncf219/.installed; then \
		NNCF_TORCH_LEGACY_TRACING=1 $(VENV)-nncf219/bin/python -m pytest -o filterwarnings=default -p no:cacheprovider \
			tests/integrations/test_nncf219.py; \
	else \
		echo "test-nncf219: SKIPPED. NNCF 2.19.0 could not be installed into $(VENV)-nncf219; see above."; \
	fi

# The other environment's Python saves folders that an older transformers loads here, and loads what is saved here.
OPTIMUM_TESTS ?= not slow
test-optimum: ## The tests of what optimum-intel does with our folders; skipped, with a line, where it cannot be installed.
	@if $(MAKE) --no-print-directory $(VENV)-optimum/.installed; then \
		COMPACTPRUNE_PYTHON=$(abspath $(BIN))/python $(VENV)-optimum/bin/python -m pytest -o filterwarnings=default \
			-p no:cacheprovider -m "$(OPTIMUM_TESTS)" tests/integrations/test_optimum.py; \
	else \
		echo "test-optimum: SKIPPED. optimum-intel could not be installed into $(VENV)-optimum; see above."; \
	fi

test-executorch: ## The tests of ExecuTorch programs; skipped, with a line, where it cannot be installed.
	@if $(MAKE) --no-print-directory $(VENV)-executorch/.installed; then \
		$(VENV)-executorch/bin/python -m pytest -o filterwarnings=default -p no:cacheprovider tests/export/test_executorch.py; \
	else \
		echo "test-executorch: SKIPPED. ExecuTorch could not be installed into $(VENV)-executorch; see above."; \
	fi

test-all: lint test-executorch ## The same with the slow tests, and all of them with the oldest versions.
	$(MAKE) --no-print-directory test-floors FLOORS=tests
	$(MAKE) --no-print-directory test-optimum OPTIMUM_TESTS="not gpu"
	$(BIN)/python -m pytest -n 2 -m "not gpu"

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/.installed-dev ## The documentation as a site, in site/. Every warning is an error. tests/docs builds it, too.
	$(BIN)/python tools/key_tables.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

docs-serve: $(VENV)/.installed-dev ## The same on a local address, while you write.
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve

bench: $(VENV)/.installed-dev ## The benchmarks that BENCH names (all: two days). Goes on with: make bench BENCH=resume
	$(BIN)/python examples/benchmarks/bench.py $(if $(filter resume list,$(BENCH)),$(BENCH),run $(or $(BENCH),all))

dist: $(VENV)/.installed-dev ## Source archive and wheel in dist/, tried in a new environment outside of the repository.
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python tools/check_dist.py dist

bench-deps: $(VENV)/.installed-dev ## What only the benchmarks need, for those that are run without `make bench`.
	$(PIP) --no-deps torch-pruning

clean:
	rm -rf $(VENV) $(VENV)-floors $(VENV)-nncf219 $(VENV)-optimum $(VENV)-executorch .venv-bench build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e ".[report]"
	touch $@

# Without dependencies: torchvision, which timm and onnx2torch import, must not bring a CUDA build of torch.
$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) -e ".[dev]"
	$(PIP) --no-deps timm torchvision onnx2torch
	$(PIP) huggingface_hub pyyaml pillow
	touch $@

# What each of the three alone needs; everything else is $(VENV)'s, which stands behind.
define an_environment_before
	$(PYTHON) -m venv $(1)
	behind=$$($(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))") && \
		own=$$($(1)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))") && \
		echo "import site; site.addsitedir('$$behind')" > "$$own/behind.pth"
	$(1)/bin/python -m pip install --disable-pip-version-check $(PIP_FLAGS) $(2)
endef
torch_here = $$(sed -n '/^torch==/p' constraints.txt)

$(VENV)-nncf219/.installed: $(VENV)/.installed-dev
	$(call an_environment_before,$(VENV)-nncf219,$(torch_here) nncf==2.19.0)
	touch $@

$(VENV)-optimum/.installed: $(VENV)/.installed-dev
	$(call an_environment_before,$(VENV)-optimum,$(torch_here) optimum-intel==2.2.0)
	touch $@

# It asks for much that exporting does not need: Core ML, pandas, configuration tools.
$(VENV)-executorch/.installed: $(VENV)/.installed-dev
	$(call an_environment_before,$(VENV)-executorch,-c constraints.txt --no-deps executorch torchao ruamel.yaml)
	touch $@

$(VENV)-floors/.installed: pyproject.toml constraints-floors.txt
	$(PYTHON) -m venv $(VENV)-floors
	$(VENV)-floors/bin/python -m pip install --disable-pip-version-check $(PIP_FLAGS) -c constraints-floors.txt \
		-e . pytest pytest-xdist hypothesis matplotlib
	touch $@
