# `make` lists the targets. They run in the active virtual environment.
.DEFAULT_GOAL := help
EWC_DATA ?= ../shared/data
.PHONY: help install lint lock test slow coverage mutation studies bench results docs

help: ## List the targets
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 12

install: ## Install the library, the application and the tools of development
	python -m pip install -e ".[dev]"

lock: ## Write constraints.txt with the newest versions; needs uv
	UV_CUSTOM_COMPILE_COMMAND="make lock" uv pip compile pyproject.toml --upgrade --universal --extra dev --no-annotate \
		--no-emit-package ewc --no-emit-package pip --output-file constraints.txt

lint: ## Check style and types
	ruff check .
	ruff format --check .
	mypy

test: ## Run the tests, without the slow ones
	pytest -n auto

slow: ## Run the slow tests
	pytest -n auto -m slow

coverage: ## Run all tests, and show the lines that none of them reaches
	pytest -n auto -m "slow or not slow" --cov

mutation: ## See that the tests find a tenth of the mutants of penalty and matrices; needs mutmut
	python -m mutmut run "*__mutmut_*3"

studies: ## Measure what theory says of the matrix, every topic
	python -m studies all

bench: ## Measure speed; needs the extra bench, and MNIST in EWC_DATA
	python scripts/bench_speed.py --data-root "$(EWC_DATA)"

results: ## Write RESULTS.md from the kept results
	python -m experiments.results

docs: ## Build the pages of docs/ as a site in build/docs; needs the extra docs
	mkdocs build
