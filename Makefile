# GNU make. `make` alone lists the targets.

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
# The number of processes that share the tests, which often wait. The tests of a file stay in one process.
PYTEST_PROCESSES ?= 3

# ClickHouse's engine, for tests. It has wheels for Linux on two machines and says that it needs pandas, but only its data
# frames do.
ENGINE := "chdb-core==26.9.0; sys_platform == 'linux' and (platform_machine == 'x86_64' or platform_machine == 'aarch64')"

PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
DOCS_VENV := $(VENV)-docs
DOCS_STAMP := $(DOCS_VENV)/.installed

# ZenML would report its use over the network and open a browser.
export ZENML_ANALYTICS_OPT_IN := false
export AUTO_OPEN_DASHBOARD := false
# Each process that shares the tests, and each program that they start, would compile all sources anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install demo docs guides bench test coverage test-unit test-versions test-releases test-resolutions release-check test-deep torture soak check lint types imports format clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# The stamp is written last, so an interrupted install starts again.
$(STAMP): pyproject.toml constraints.txt
	@echo "Installing into $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install --quiet --no-input --disable-pip-version-check -c constraints.txt -e '.[all,dev]'
	@$(PY) -m pip install --quiet --no-input --disable-pip-version-check --no-deps $(ENGINE)
	@touch $@

install: $(STAMP) ## make the virtual environment, with the package and its dependencies

# The extra alone, in an environment of its own: the site is built from the sources, without the package or ZenML.
$(DOCS_STAMP): $(STAMP)
	@$(PYTHON) -m venv $(DOCS_VENV)
	@$(PY) -c "from importlib.metadata import requires; print(*(line.split(';')[0] for line in \
		requires('composite-logstore') if line.endswith(\"'docs'\")), sep='\n')" >$(DOCS_VENV)/requirements.txt
	@$(DOCS_VENV)/bin/python -m pip install --quiet --no-input --disable-pip-version-check -c constraints.txt \
		-r $(DOCS_VENV)/requirements.txt
	@touch $@

# Without the variable, Material advertises its successor. With --quiet, warnings would not fail the build.
docs: $(DOCS_STAMP) ## build the documentation site: open site/index.html
	@NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/python -m mkdocs build --strict --clean
	@echo "site/index.html"

guides: $(STAMP) ## follow the guides and sessions of docs/, and write the output of their commands into the pages
	@GUIDES=write $(PY) -m pytest tests/integration/test_guides.py tests/integration/test_sessions.py --timeout=0 $(PYTEST_ARGS)

demo: $(STAMP) ## see it work, with real servers on this machine, which STAY=1 leaves running until Ctrl-C
	@STAY=$(STAY) $(PY) -m examples.demo

bench: $(STAMP) ## measure everything beside the competitors, and draw the plots of docs/benchmarks.md
	@$(PY) -m benchmarks

SHARED := -n $(PYTEST_PROCESSES) --dist loadscope --no-loadscope-reorder

test: $(STAMP) ## all tests but the deep ones
	@$(PY) -m pytest -m 'not deep' $(SHARED) $(PYTEST_ARGS)

# Not a part of `make test`, since it doubles the time of the tests.
coverage: $(STAMP) ## which lines the unit tests execute
	@$(PY) -m pytest tests/unit -m 'not deep' $(SHARED) --cov --cov-report=term $(PYTEST_ARGS)

test-unit: $(STAMP) ## the fast tests only: unit and properties
	@$(PY) -m pytest tests/unit tests/properties -m 'not deep' $(PYTEST_ARGS)

# VERSIONS=turn runs the one whose turn it is today.
test-versions: $(STAMP) ## unit, property and process tests on every other Python of this machine
	@$(PY) -m tests.versions "$(VERSIONS)" $(PYTEST_PROCESSES) $(PYTEST_ARGS)

test-resolutions: $(STAMP) ## unit and property tests on the lowest and the newest dependencies
	@$(PY) -m tests.resolutions $(PYTEST_PROCESSES) $(PYTEST_ARGS)

release-check: $(STAMP) ## build what is released, install it elsewhere, and run the demo from it
	@$(PY) -m tests.released

# RELEASES="0.93.0 0.98.0" runs some of them, and RELEASES=turn the one whose turn it is today.
test-releases: $(STAMP) ## tests on releases of ZenML, in RELEASES or all; writes docs/compatibility.md
	@$(PY) -m tests.releases "$(RELEASES)" $(PYTEST_PROCESSES) $(PYTEST_ARGS)

test-deep: $(STAMP) ## the tests that take minutes
	@$(PY) -m pytest -m deep --timeout=0 $(PYTEST_ARGS)
	@$(PY) -m pytest tests/properties -m 'not deep' --hypothesis-profile=deep --timeout=0 $(PYTEST_ARGS)
	@COMPOSITE_LOGSTORE_DELIVERY=agent $(PY) -m pytest tests/e2e --timeout=0 $(PYTEST_ARGS)
	@$(PY) -m tests.versions "" $(PYTEST_PROCESSES)
	@$(PY) -m tests.releases "" $(PYTEST_PROCESSES)
	@$(PY) -m tests.resolutions $(PYTEST_PROCESSES)

# The same SEED draws the same faults; without one, each run draws others.
torture: $(STAMP) ## everything at once for SECONDS seconds (300): kills, forks, failing backends, damaged folders
	@TORTURE_SEED=$(SEED) TORTURE_SECONDS=$(or $(SECONDS),300) $(PY) -m pytest tests/torture/test_torture.py \
		-k whatever --timeout=0 $(PYTEST_ARGS)

soak: $(STAMP) ## log for SECONDS seconds (1800): memory, threads and descriptors stay flat
	@SOAK_SECONDS=$(or $(SECONDS),1800) $(PY) -m pytest tests/soak -k stay --timeout=0 $(PYTEST_ARGS)

check: lint types imports ## all checks except the tests

lint: $(STAMP) ## ruff: rules and format
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

types: $(STAMP) ## mypy, strict
	@$(PY) -m mypy

imports: $(STAMP) ## import-linter: who may import whom
	@$(VENV)/bin/lint-imports

format: $(STAMP) ## let ruff fix the code
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

clean: ## remove the virtual environment, caches and reports
	rm -rf .venv-lowest .venv-newest .venv-messages
	rm -rf $(VENV) $(DOCS_VENV) .venv-3.* .venv-zenml-* build dist site htmlcov .coverage .coverage.* coverage.xml \
		.hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
