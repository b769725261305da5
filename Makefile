# Everything runs in .venv, which the first target that needs it makes.
#   make demo       set up, then train the demo                         (about 3 minutes after set-up)
#   make test       set up, then all checks and tests
#   make accept     the demo on three seeds and its control, and rewards (about half an hour)
#   make faults     the full counts of the fault tests                  (about 20 minutes)
#   make test-gpu   the GPU kernels, on a host that has them: docs/gpu.md (GPU_PYTHON=python3)
#   make test-sglang  the engine's tests with a newer SGLang (SGLANG=0.5.23) beside the pinned one
#   make test-verifiers  the tests of environments of the package verifiers, which is put beside the rest
#   make nightly    the replay stream's state machine, at length
#   make bench      the benchmarks of the replay stream, packing and rollouts  (about 12 minutes on an idle machine)
#   make rehearse   both commands in a fresh clone and a fresh environment
# TORCH_INDEX=URL   package index for torch, where the default one would bring CUDA builds
# PYTHON=python3.12 another interpreter

VENV := .venv
PYTHON ?= $(shell command -v python3.11 || command -v python3)
GPU_PYTHON ?= python3
SGLANG ?= 0.5.23
PIP := $(VENV)/bin/pip --disable-pip-version-check
READY := $(VENV)/.ready
TORCH_INDEX ?=
# Real text for tests, if it lies beside the checkout.
export SLIPSTREAM_TEST_DATA ?= $(abspath $(wildcard ../shared/data))

.PHONY: setup demo test test-gpu test-sglang test-verifiers check faults nightly accept rehearse bench clean

setup: $(READY)

$(READY): pyproject.toml requirements/torch.txt requirements/cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) -r requirements/torch.txt
	$(PIP) install --quiet --no-deps --ignore-requires-python -r requirements/cpu.txt
	$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	touch $@

demo: $(READY)
	$(VENV)/bin/launch demo $(ARGS)

check: $(READY)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

test: check
	$(VENV)/bin/python -m pytest -m "not accept and not faults" $(ARGS)

# On a GPU host, with its own Python: the environment above is a CPU's. Its pytest may lack plug-ins that the
# settings in pyproject.toml name, or have some that fail, and its packages warn.
test-gpu:
	PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 $(GPU_PYTHON) -m pytest -c /dev/null --rootdir . -p no:cacheprovider -q -s tests/gpu $(ARGS)

$(VENV)/sglang-$(SGLANG): $(READY)
	$(PIP) install --quiet --no-deps --target $@ sglang==$(SGLANG)

test-sglang: $(VENV)/sglang-$(SGLANG)
	PYTHONPATH=$(abspath $<) $(VENV)/bin/python -m pytest tests/e2e/test_engine.py tests/e2e/test_engine_families.py \
		tests/e2e/test_continuation.py tests/e2e/test_weights.py $(ARGS)

$(VENV)/verifiers/.ready: requirements/verifiers.txt $(READY)
	$(PIP) install --quiet --no-deps --upgrade --target $(VENV)/verifiers -r requirements/verifiers.txt
	touch $@

test-verifiers: $(VENV)/verifiers/.ready
	PYTHONPATH=$(abspath $(VENV)/verifiers) $(VENV)/bin/python -m pytest tests/unit/actors/test_verifiers.py \
		tests/unit/actors/test_examples.py $(ARGS)

faults: $(READY)
	$(VENV)/bin/python -m pytest -m faults tests/faults $(ARGS)

# The stream's state machine, 2,000 examples of up to 200 steps (most of an hour).
nightly: $(READY)
	$(VENV)/bin/python -m pytest --hypothesis-profile thorough tests/contract/test_machine.py $(ARGS)

accept: $(READY)
	$(VENV)/bin/python -m pytest -m accept tests/e2e tests/unit/actors $(ARGS)

$(VENV)/bench/.ready: requirements/bench.txt $(READY)
	$(PIP) install --quiet --no-deps --upgrade --target $(VENV)/bench -r requirements/bench.txt
	touch $@

bench: $(VENV)/bench/.ready
	PYTHONPATH=$(VENV)/bench $(VENV)/bin/python -m benchmarks.queue --json
	$(VENV)/bin/python -m benchmarks.admission --json
	$(VENV)/bin/python -m benchmarks.late_policies --plot docs/late_policies.png --json
	$(VENV)/bin/python -m benchmarks.packing --json
	$(VENV)/bin/python -m benchmarks.rollout --json
	$(VENV)/bin/python -m benchmarks.learner_step --json
	$(VENV)/bin/python -m benchmarks.scale_out --json

rehearse:
	.ci/rehearse

clean:
	rm -rf $(VENV) runs *.egg-info
