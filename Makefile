PYTHON ?= python3
BIN := .venv/bin
SAMPLE := tests/data/pasted
GROUPS := 100000

.PHONY: demo test lint bench faults soak gpu-check weights clean

demo: .venv/demo  ## set up, export the demo checkpoint, run it on groups that it has never seen
	@mkdir -p build
	$(BIN)/python export/to_onnx.py --checkpoint weights/icnet_demo.pth --output build/icnet.onnx
	$(BIN)/icnet predict $(SAMPLE) --model build/icnet.onnx --output build/demo
	$(BIN)/icnet predict tests/data/bird --model build/icnet.onnx --sisms builtin --output build/demo
	@echo "Look at build/demo/*/contact_sheet.jpg (this small network knows drawings only: on the photographs it fails)"

test: .venv/test  ## set up, run all tests, in as many processes as there are cores, at most 4
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist worksteal

lint: .venv/test  ## style, types, and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

faults: .venv/test  ## every fault case (an hour or two on two cores), and their table in docs/reliability.md
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults --write

soak: .venv/test  ## GROUPS small groups from 8 threads; memory over time goes to docs/soak.png
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults.soak --groups $(GROUPS)

bench: .venv/bench  ## latency and memory, side by side
	$(BIN)/icnet bench latency --output build/latency.json

gpu-check: .venv/gpu  ## on a machine with a GPU: the tests that need one, and the comparison (CHECKPOINT=FILE to give one)
	$(BIN)/pytest -m gpu
	$(BIN)/icnet bench latency --device cuda $(if $(CHECKPOINT),--checkpoint '$(CHECKPOINT)')

weights: .venv/test  ## train the demo checkpoint again and measure it (needs npm and apt-get; two hours)
	$(MAKE) -C weights

clean:
	rm -rf build .venv

.venv/%: pyproject.toml constraints.txt
	@echo "Setting up .venv (minutes the first time: it installs PyTorch)"
	@test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[$(EXTRAS)]"
	@touch $@

.venv/demo: EXTRAS := cpu,opencv,export
.venv/bench: EXTRAS := cpu,mnn,export,bench
.venv/test: EXTRAS := cpu,mnn,opencv,export,evaluate,calibrate,train,test
.venv/gpu: EXTRAS := cpu,opencv,export,evaluate,calibrate,train,test,gpu
