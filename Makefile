# make repro: the whole pipeline on the embedded sample. make test: the fast tests. make help: the rest.
PYTHON ?= python3
VENV := .venv
# DVC starts the stages as `python`, which must be this environment's even where it is not activated.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
FAISS := $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)

.PHONY: help install install-dev repro compare ablate test test-all check ui clean
help:
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*##/  /'

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 repro")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	python -m pip install --quiet '.[$(FAISS)]'
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/bin/python
	python -m pip install --quiet '.[$(FAISS),dev]'
	@touch $@ $(VENV)/.installed

install: $(VENV)/.installed  ## create .venv and install what the pipeline needs
install-dev: $(VENV)/.installed-dev  ## the same with the tools for development

repro: install  ## run the pipeline on what params.yaml says, the embedded sample as shipped
	dvc repro
	@echo
	@cat metrics/eval.json
	@echo
	@echo "next:  . $(VENV)/bin/activate"
	@echo "       python -m stages.ask 'Which country is Warsaw Modlin Airport in?'"
	@echo "       make ui                                # the run in MLflow: loss curves, scores, the model"
	@echo "       make report                            # a page: scores, curves, wrong answers"
	@echo "       make demo                              # a page to ask"
	@echo "       dvc exp run -n more -S train.max_steps=200    # change something (commit first), then: make runs"

compare: install  ## both recipes as DVC experiments `old` and `new`, then what differs
	python -m stages.compare recipes
	dvc metrics diff old new

ablate: install  ## every bug of the old recipe put back alone, three seeds each, through DVC's queue
	python -m stages.compare ablation --seeds 3

# A worker a core, one thread each: two test runs with several threads each slow each other down tenfold.
PYTEST := OMP_NUM_THREADS=1 python -m pytest --numprocesses logical --maxprocesses 8 --dist loadfile
test: install-dev  ## the fast tests
	$(PYTEST) -m 'not slow'

test-all: install-dev  ## all tests
	$(PYTEST)

check: install-dev  ## ruff
	ruff check .
	ruff format --check .

ui: install  ## MLflow's pages on 127.0.0.1; prints the address of this experiment's runs
	python -m stages.tracking.ui

.PHONY: report demo runs
report: install  ## the last run as a page: scores, curves, wrong answers; opens without network
	dvc repro report
	@echo "open $(CURDIR)/data/report/report.html"

demo: install  ## a page to ask the trained model, on 127.0.0.1
	python -m stages.demo

runs: install  ## the experiments of the last commit as a table: what differs, what came out
	@python -m stages.runs

clean:  ## remove what can be made again (never data/tiny, never MLflow's store)
	rm -rf .checkpoints .pytest_cache .ruff_cache build *.egg-info

.PHONY: chaos unlock audit
# For who works on the project itself.
chaos: install-dev  ## (development) kill the pipeline at 20 random points, compare what comes out
	python -m stages.chaos

unlock: install  ## (development) mend dvc.lock and DVC's rwlock where a killed DVC left them half written
	python -m stages.chaos.unlock

audit: install-dev  ## (development) known vulnerabilities of the installed packages; reports, never fails
	@out=$$(pip-audit --progress-spinner off --skip-editable 2>&1); code=$$?; echo "$$out"; \
	left=$$(echo "$$out" | grep -c 'could not be audited'); \
	test "$$left" = 0 || echo "audit: the advisory service gave no answer about $$left packages: nothing is known about them"; \
	test "$$code" = 0 || echo "audit: findings above, or the advisory service could not be reached (exit code $$code)"
