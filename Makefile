PYTHON ?= python3
BIN := .venv/bin
SAMPLE := tests/data/bird

.PHONY: demo test lint bench gpu-check clean

demo: .venv/demo  ## set up, export a network, run it on a group of photographs
	@mkdir -p build
	@echo "No trained weights yet: this network's are random, so the maps mean nothing; the chain is real."
	@$(BIN)/python -c "import torch; from export.checkpoint import save_checkpoint; from export.icnet import ICNet; \
		torch.manual_seed(0); save_checkpoint('build/random.pth', ICNet(width=0.25))"
	$(BIN)/python export/to_onnx.py --checkpoint build/random.pth --output build/icnet.onnx
	$(BIN)/icnet predict $(SAMPLE) --model build/icnet.onnx --sisms builtin --output build/demo
	@echo "Look at build/demo/bird/contact_sheet.jpg"

test: .venv/test  ## set up, run all tests
	$(BIN)/pytest

lint: .venv/test  ## style, types, and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: .venv/demo  ## latency and memory, side by side
	$(BIN)/icnet bench --output build/latency.json

gpu-check: .venv/gpu  ## on a machine with a GPU: the tests that need one, and the race (CHECKPOINT=FILE to give one)
	$(BIN)/pytest -m gpu
	$(BIN)/icnet bench --device cuda $(if $(CHECKPOINT),--checkpoint '$(CHECKPOINT)')

clean:
	rm -rf build .venv

.venv/%: pyproject.toml constraints.txt
	@echo "Setting up .venv (minutes the first time: it installs PyTorch)"
	@test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[$(EXTRAS)]"
	@touch $@

.venv/demo: EXTRAS := cpu,opencv,export
.venv/test: EXTRAS := cpu,opencv,export,test
.venv/gpu: EXTRAS := cpu,opencv,export,test,gpu
