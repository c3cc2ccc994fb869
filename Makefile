# make demo     draw pictures with the model in models/zoo (makes .venv on the first run)
# make test     format check, lint, types, import rules, tests
# make lint     the same without the tests
# make format   mend what ruff can mend

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO_DIR ?= demo
# Further options for pip, such as an index of CPU builds of torch.
PIP_FLAGS ?=
# Two processes; tests/conftest.py gives each one thread.
PYTEST_FLAGS ?= -n 2

INSTALL := $(BIN)/python -m pip install --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt
# Types of TensorRT for mypy. They require TensorRT itself, which is on NVIDIA's own index alone: hence --no-deps.
TENSORRT_STUBS := tensorrt-stubs==10.13.0.35.1
# Triton's client, and the schema of its configurations. It asks for older versions of protobuf and ml_dtypes than the
# pinned ones, and does without: hence --no-deps.
TRITON_CLIENT := tritonclient==2.73.0 python-rapidjson==1.25
INPUTS := setup.cfg pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test lint format clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

# Stamps: a second run installs nothing unless the metadata or a pin changed. The install is editable, so sources need none.
$(VENV)/.python:
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.demo: $(VENV)/.python $(INPUTS)
	$(INSTALL) -e '.[cpu,export,train]'
	@touch $@

$(VENV)/.dev: $(VENV)/.python $(INPUTS)
	$(INSTALL) -e '.[cpu,openvino,rtx,export,train,evaluate,serve,ray,dev]'
	$(INSTALL) --no-deps $(TENSORRT_STUBS) $(TRITON_CLIENT)
	@touch $@ $(VENV)/.demo

demo: $(VENV)/.demo
	$(BIN)/far demo -o $(DEMO_DIR)

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python scripts/mend_tensorrt_stubs.py .stubs
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .stubs build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
