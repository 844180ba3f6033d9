# make reproduce, make test and make ui need Python ≥ 3.11 and nothing else; the environment is made in .venv.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PLUGINS := $(wildcard plugins/*/pyproject.toml)
# Of the environment, as `du -sh .venv` says it on Linux.
SIZE := about 7 GB
# Says every second that what it runs is at work.
WAIT = $(PYTHON) layerlab/cli/installing.py .
WANTED := -c constraints.txt -e '.[dev]' $(foreach p,$(dir $(PLUGINS)),-e ./$(p))

# Nothing is sent to anybody; MLFLOW_DISABLE_TELEMETRY=false lets MLflow report its use.
export MLFLOW_DISABLE_TELEMETRY ?= true

.PHONY: reproduce test test-all lint docs wheels ui lab benchmarks clean
.DELETE_ON_ERROR:

reproduce: $(READY)  ## every installed paper at the quick profile, then a sentence for each
	$(BIN)/layerlab reproduce

# One thread a worker, and a worker more than cores: many tests wait for a kernel or a process of their own.
test: $(READY)  ## the test suite but for what takes minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 3 --dist worksteal

test-all: $(READY)  ## the slow tests, too: kills at random moments, many writers, clusters, other trainers
	$(BIN)/pip install --quiet -c constraints.txt -e '.[datasets,docs,huggingface,lightning,metrics]'
	LAYERLAB_SLOW=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 3 --dist worksteal

lint: $(READY)  ## ruff, then mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(READY)  ## the contract and the list of names from the docstrings, then the site into site/
	$(BIN)/python docs/contract.py
	@$(BIN)/python -c 'import mkdocs, mkdocstrings_handlers.python, material' 2>/dev/null || \
	  $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "open $$PWD/site/index.html, or run $(BIN)/python -m mkdocs serve"

# What the site's page on Colab installs; SITE_URL is where the site is published.
wheels: $(READY)  ## wheels of layerlab and its plugins into site/wheels, and their addresses into site/wheels.txt
	rm -rf site/wheels
	$(BIN)/python -m pip wheel -q --disable-pip-version-check --no-deps --wheel-dir site/wheels . \
	  $(foreach p,$(dir $(PLUGINS)),./$(p))
	cd site/wheels && for wheel in *.whl; do echo "$(SITE_URL:/=)/wheels/$$wheel"; done > ../wheels.txt

ui: $(READY)  ## MLflow on http://127.0.0.1:5000
	$(BIN)/mlflow ui --backend-store-uri "$$(LAYERLAB_HOME="$$PWD" MLFLOW_TRACKING_URI= $(BIN)/python -c 'from layerlab.runs.tracking import tracking_uri; print(tracking_uri())')" --host 127.0.0.1 --port 5000

lab: $(READY)  ## JupyterLab on 127.0.0.1
	LAYERLAB_HOME="$$PWD" $(BIN)/jupyter lab --ip 127.0.0.1 --notebook-dir=notebooks --LabApp.news_url=None --LabApp.check_for_updates_class=jupyterlab.handlers.announcements.NeverCheckForUpdate

benchmarks: $(READY)  ## every speed and memory ratio, into results/benchmarks.md (about an hour)
	$(BIN)/python benchmarks/all.py

clean:  ## remove the environment; runs/ and mlflow.db stay
	rm -rf $(VENV)

$(READY): pyproject.toml constraints.txt $(PLUGINS)
	@test -n "$(PYTHON)" || { echo "layerlab needs Python 3.11 or later; install it or run make PYTHON=/path/to/python3"; exit 2; }
	@echo "Making the environment in $(VENV): it takes $(SIZE), most of it torch with CUDA, and some minutes."
	@df -h . | awk 'NR == 2 {print "Free here: " $$4}'
	@$(WAIT) $(PYTHON) -m venv $(VENV)
	@$(WAIT) $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt uv
	@# uv takes half of pip's time; where only pip knows the way to the packages (a mirror, say), pip takes over.
	@$(WAIT) $(BIN)/uv pip install -q --compile-bytecode --python $(BIN)/python $(WANTED) || \
	  $(WAIT) $(BIN)/python -m pip install -q --disable-pip-version-check $(WANTED)
	@touch $@
