# Every target does its own set-up: virtual environment, pinned dependencies, Mosquitto where apt and root are there.
VENV   := .venv
PYTHON := $(VENV)/bin/python
READY  := $(VENV)/.ready

.PHONY: test demo check slow fuzz gate gpu chaos oldest runtimes setup clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt scripts/setup
	bash scripts/setup $(VENV)
	touch $(READY)

# The same examples at each run (hypothesis' profile ci): a new one belongs to `make fuzz`, not to somebody's pull request.
# One thread: tiny tensors gain nothing from more, and on a busy machine threads that spin wait for each other (measured 11 min against 7).
test: $(READY)          ## default tests: under five minutes on two cores, no GPU, no network
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PYTHON) -m pytest -n 3 --dist worksteal --hypothesis-profile=ci

slow: $(READY)          ## tests of several processes, and on the real image sets of ../shared/data, where they are there
	$(PYTHON) -m pytest -m slow --timeout 3600

fuzz: $(READY)          ## the tests that invent their input, each time with new ones
	$(PYTHON) -m pytest tests/faults/test_bad_settings.py tests/edge_dkm/test_commands.py tests/edge_dkm/test_outbox_model.py

chaos: $(READY)         ## the long forms of the promises: kills, power cuts, full disks, stalls, camera faults, soak; an hour and a half
	$(PYTHON) -m benchmarks.line.chaos --mode e2e
	$(PYTHON) -m benchmarks.line.chaos --mode journal
	$(PYTHON) -m benchmarks.line.power_cuts
	$(PYTHON) -m benchmarks.line.outage
	$(PYTHON) -m benchmarks.line.stalls
	$(PYTHON) -m benchmarks.line.camera_faults
	$(PYTHON) -m benchmarks.line.soak

gate: $(READY)          ## regression gate on all of MNIST, three seeds: hours without a GPU
	$(PYTHON) -m pytest -m gate --timeout 86400

gpu: $(READY)           ## tests that need a CUDA device
	$(PYTHON) -m pytest -m gpu --timeout 1200

oldest: $(READY)        ## the base install with the oldest versions (constraints-oldest.txt, without torch) gives the same answers
	bash scripts/setup_oldest build
	OMP_NUM_THREADS=1 $(PYTHON) -m tests.runtimes.prepare build/material-oldest --further 200
	$(PYTHON) -m tests.runtimes build/material-oldest --only newest oldest
	$(PYTHON) -m tests.runtimes.oldest build/material-oldest

# ALLOW_MISSING="openvino web" accepts that these could not be set up or run; what was not run is said in any case.
runtimes: $(READY)      ## the same file in onnxruntime newest and 1.17, OpenVINO, and onnxruntime-web in Chromium: ten minutes
	-bash scripts/setup_oldest build
	-bash scripts/setup_runtimes build
	OMP_NUM_THREADS=1 $(PYTHON) -m tests.runtimes.prepare build/material
	$(PYTHON) -m tests.runtimes build/material --allow-missing $(ALLOW_MISSING)
	OMP_NUM_THREADS=1 EDGE_DKM_ALLOW_MISSING="$(ALLOW_MISSING)" $(PYTHON) -m pytest -m runtimes --timeout 3600

check: $(READY)         ## lint and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

demo: $(READY)          ## film, record, train, export, run the line, judge
	$(PYTHON) -m demo

clean:
	rm -rf $(VENV) build demo/out runs .pytest_cache .mypy_cache .ruff_cache
