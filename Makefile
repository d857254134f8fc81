# `make demo` and `make test` set themselves up in .venv; a second run only runs.
PYTHON ?= python3
WORKERS ?= 2

BIN := .venv/bin
FAST := tests/test_layout.py tests/lasso/test_prox.py tests/lasso/test_problem.py tests/calibration tests/report \
        tests/graph/test_groups.py tests/collapse/test_collapse.py tests/refit/test_refit.py tests/selection/test_amount.py \
        tests/selection/test_budget.py tests/selection/test_selectors.py tests/test_inspection.py

.PHONY: demo quick test format bench docs package audit clean help

# Threads that wait give the processor away: on a busy machine the demo is several times as fast.
demo: .venv/recipes.stamp ## train LeNet-5 on real digits, prune it, write a table and plots
	OMP_WAIT_POLICY=passive $(BIN)/lnr-prune lenet5

# One torch thread per worker: more only get in each other's way.
quick: .venv/test.stamp ## lint, types and the fast part of the tests, within a minute
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) -q $(FAST)

test: .venv/test.stamp ## lint, types, security and all tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/bandit --quiet --recursive lnr_prune adapters
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist loadscope --durations=20 --cov

format: .venv/test.stamp ## let ruff format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/bench.stamp ## the LeNet-5 benchmark on MNIST
	OMP_WAIT_POLICY=passive $(BIN)/python benchmarks/lenet5_mnist.py

# Tutorials run as the pages are built; a warning is an error, and so is a link that leads nowhere.
docs: .venv/docs.stamp ## build the pages into build/docs; warnings are errors
	OMP_NUM_THREADS=1 $(BIN)/sphinx-build -W --keep-going docs build/docs
	OMP_NUM_THREADS=1 $(BIN)/sphinx-build -W --keep-going -q -b linkcheck -D plot_gallery=0 docs build/links

# Wheel and sdist; the wheel, which is made from the sdist, is installed where nothing else is and tried.
package: .venv/package.stamp ## build wheel and sdist into dist, and try the wheel
	rm -rf dist build/wheel
	$(BIN)/python -m build --no-isolation
	$(BIN)/twine check --strict dist/*
	$(PYTHON) -m venv build/wheel
	build/wheel/bin/python -m pip install -c constraints.txt dist/*.whl
	cd build && wheel/bin/python -I -W error ../tests/helpers/smoke.py

# Known vulnerabilities of the pinned versions; asks the package index's database, and fails where that has no answer.
audit: ## ask for known vulnerabilities of the pinned versions
	$(PYTHON) -m venv build/audit
	build/audit/bin/python -m pip install pip-audit
	build/audit/bin/pip-audit --strict --no-deps --disable-pip -r constraints.txt

clean: ## remove environments, builds and caches
	rm -rf .venv build dist docs/gallery docs/sg_execution_times.rst htmlcov .coverage* .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-9s %s\n", $$1, $$2}' Makefile

# .venv/EXTRA.stamp: the environment holds the extra EXTRA. Every extra includes `recipes`.
.venv/%.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt -e '.[$*]'
	touch $@ .venv/recipes.stamp
