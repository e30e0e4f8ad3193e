# Exactly two commands set everything up: `make demo` and `make test`. `make help` lists the rest.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo demo-joint reproduce-cholec80 test test-view test-slurm fast fuzz torture lint types bench gpu-check clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-18s %s\n", $$1, $$2}'

install: $(STAMP) ## create .venv and install everything into it

$(STAMP): setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $(STAMP)

SEED ?= 0
DEMO_NAME ?= $(if $(filter 0,$(SEED)),demo,demo-seed$(SEED))

demo: $(STAMP) ## simulate operations, run the whole pipeline on them, print where to look (SEED=1 for others)
	$(BIN)/python pipeline.py simulate artifacts/demo/videos-$(SEED) --videos 44 --seed $(SEED) --fps 2 \
		--width 112 --height 112 --speed-up 16 --workers 2
	$(BIN)/python pipeline.py run --config configs/demo.yaml --name $(DEMO_NAME) --set seed=$(SEED) \
		--set data.root=artifacts/demo/videos-$(SEED) --set data.index=artifacts/demo/index-$(SEED).json
	$(BIN)/python pipeline.py report runs/$(DEMO_NAME)

demo-joint: demo ## then both stages as one net, fine-tuned end to end with the correlation loss
	$(BIN)/python pipeline.py train-joint --config configs/demo_joint.yaml --name $(DEMO_NAME)-joint --set seed=$(SEED) \
		--from-cnn $(DEMO_NAME) --from-temporal $(DEMO_NAME) \
		--set data.root=artifacts/demo/videos-$(SEED) --set data.index=artifacts/demo/index-$(SEED).json
	$(BIN)/python pipeline.py evaluate --config configs/demo_joint.yaml --name $(DEMO_NAME)-joint --set seed=$(SEED) \
		--set data.root=artifacts/demo/videos-$(SEED) --set data.index=artifacts/demo/index-$(SEED).json

# ROOT is the folder of all 80 videos. OPTIONS="--seeds 1 --splits 40/40" does less, OPTIONS=--dry-run prints the commands,
# REHEARSE=1 runs every recipe on a few simulated operations, on the CPU.
REHEARSAL := artifacts/reproduce-rehearsal
REPRODUCE = $(BIN)/python benchmarks/reproduce_cholec80.py
reproduce-cholec80: $(STAMP) ## full Cholec80: published and best recipes, every seed and split (ROOT=DIR, or REHEARSE=1)
ifdef REHEARSE
	$(BIN)/python pipeline.py simulate $(REHEARSAL)/videos --videos 6 --seed 1 --fps 2 --width 64 --height 64 --speed-up 100
	$(REPRODUCE) --root $(REHEARSAL)/videos --runs $(REHEARSAL)/runs --out $(REHEARSAL) --splits 3/1/2,4/2 --seeds 1 \
		--settings benchmarks/rehearsal_cholec80.yaml $(OPTIONS)
else
	$(REPRODUCE) --root '$(ROOT)' $(OPTIONS)
endif

# One process per core with one thread each; the tests of a file stay together, since they share fixtures. The order of
# the files is that of tests/conftest.py.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --max-worker-restart 0

IN_BROWSER := tests/test_view_browser.py

test: $(STAMP) lint types ## install, lint, type-check, run every test but those of the next two
	$(PYTEST) --ignore $(IN_BROWSER)

test-view: $(STAMP) ## test the viewer in a real browser (Chromium)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(IN_BROWSER)

test-slurm: $(STAMP) ## test jobs on a real Slurm of one node, installed if missing (YES=1 or CI=true consents)
	$(BIN)/python tests/slurm/run.py $(if $(YES),--yes)

fast: $(STAMP) ## only the quick tests
	$(PYTEST) -m 'not slow'

INPUTS ?= 10000

fuzz: $(STAMP) ## malformed input for every parser, seeds and totals recorded (INPUTS=10000 each; artifacts/fuzz)
	mkdir -p artifacts/fuzz
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz.campaign --inputs $(INPUTS) --workers $(WORKERS) \
		--findings artifacts/fuzz --json artifacts/fuzz/totals.json

lint: $(STAMP) ## ruff, and the import rules of pyproject.toml
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(STAMP) ## mypy on every product file
	$(BIN)/mypy

# Half an hour on two busy cores. KILLS and SEED choose how many moments, and which ones; without SEED a random seed is
# drawn and printed (the 0 of the demo above does not count as given).
KILLS ?= 50
torture: $(STAMP) ## kill -9 at KILLS random moments of extraction, training and caching; resume and compare
	$(BIN)/python -m tests.torture --kills $(KILLS) $(if $(and $(filter-out file,$(origin SEED)),$(SEED)),--seed $(SEED))

bench: $(STAMP) ## measure what docs/performance.md quotes and needs no data of yours (artifacts/bench)
	mkdir -p artifacts/bench
	$(BIN)/python benchmarks/start_up.py --json artifacts/bench/start_up.json
	$(BIN)/python benchmarks/store.py --json artifacts/bench/store.json
	$(BIN)/python benchmarks/temporal.py --json artifacts/bench/temporal.json
	$(BIN)/python benchmarks/checkpointing.py --json artifacts/bench/checkpointing.json
	$(BIN)/python benchmarks/clip_memory.py --json artifacts/bench/clip_memory.json
	$(BIN)/python benchmarks/recurrence.py --json artifacts/bench/recurrence.json
	$(BIN)/python benchmarks/heads.py --json artifacts/bench/heads.json
	$(BIN)/python benchmarks/live.py --json artifacts/bench/live.json
	$(BIN)/python benchmarks/exported.py --json artifacts/bench/exported.json
	$(BIN)/python benchmarks/loader.py --json artifacts/bench/loader.json
	$(BIN)/python benchmarks/together.py --json artifacts/bench/together.json
	$(BIN)/python benchmarks/scaling.py --json artifacts/bench/scaling.json
	$(BIN)/python benchmarks/evaluate.py --json artifacts/bench/evaluate.json
	$(BIN)/python benchmarks/readers.py --json artifacts/bench/readers.json
	$(BIN)/python benchmarks/extract.py --json artifacts/bench/extract.json
	$(BIN)/python benchmarks/encoders.py --json artifacts/bench/encoders.json
	$(BIN)/python benchmarks/instruction_sets.py --json artifacts/bench/instruction_sets.json
	$(BIN)/python benchmarks/report.py --json artifacts/bench/report.json
	$(BIN)/python benchmarks/view.py --json artifacts/bench/view.json

# On the machine with the GPU; `benchmarks/gpu/gpu_check.sh prepare` collects what a machine without internet lacks.
gpu-check: $(STAMP) ## correctness and speed on a GPU, figure by figure (STEPS="lstm resume"; REHEARSE=1 for the CPU)
	$(if $(REHEARSE),GPU_CHECK_REHEARSE=1) PYTHON=$(BIN)/python benchmarks/gpu/gpu_check.sh $(STEPS)

clean: ## remove caches (never .venv, runs or artifacts)
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
