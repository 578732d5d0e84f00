PYTHON ?= python3
BIN := .venv/bin
SAMPLE := tests/data/pasted
PHOTOS := tests/data/photos
GROUPS := 100000
PORT := 8000

.PHONY: demo web test lint bench faults soak gpu-check weights clean

demo: .venv/demo  ## set up, export two checkpoints, run them on groups that they have never seen
	@mkdir -p build
	$(BIN)/python export/to_onnx.py --checkpoint weights/icnet_photos.pth --output build/icnet_photos.onnx
	for group in fish towers; do $(BIN)/icnet predict $(PHOTOS)/$$group --model build/icnet_photos.onnx \
		--write maps,masks,cutouts,boxes --output build/demo || exit; done
	$(BIN)/python export/to_onnx.py --checkpoint weights/icnet_demo.pth --output build/icnet.onnx
	$(BIN)/icnet predict $(SAMPLE) --model build/icnet.onnx --output build/demo
	@echo "Look at build/demo/*/contact_sheet.jpg: photographs cut out (fish, towers), drawings told apart (crab, owl, violin)"

web: .venv/demo  ## the page that runs in a browser, with the network for photographs, on http://127.0.0.1:PORT/ (needs npm)
	@mkdir -p build/web
	$(BIN)/icnet export --checkpoint weights/icnet_photos.pth --banked --compact --output build/web/icnet.onnx
	$(BIN)/icnet web --model build/web/icnet.onnx --samples $(PHOTOS)/fish $(PHOTOS)/towers --output build/web/site --serve $(PORT)

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

gpu-check: .venv-gpu/ready  ## on a machine with a GPU: whatever needs one, compared with the CPU (CHECKPOINT=FILE to give a network)
	.venv-gpu/bin/icnet bench gpu-check $(if $(CHECKPOINT),--checkpoint '$(CHECKPOINT)')

weights: .venv/weights  ## train the demo checkpoints again and measure them (needs npm and apt-get; three hours)
	$(MAKE) -C weights

clean:
	rm -rf build .venv .venv-gpu

.venv/%: pyproject.toml constraints.txt
	@echo "Setting up .venv (minutes the first time: it installs PyTorch)"
	@test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[$(EXTRAS)]"
	@touch $@

.venv/demo: EXTRAS := cpu,opencv,export
.venv/bench: EXTRAS := cpu,openvino,mnn,export,bench
.venv/test: EXTRAS := cpu,openvino,mnn,opencv,export,evaluate,calibrate,train,triton,ray,ray-serve,test,web-test
.venv/weights: EXTRAS := cpu,openvino,mnn,opencv,export,evaluate,calibrate,train,distil

# An environment of its own: onnxruntime-gpu can't be beside onnxruntime. NVIDIA's tensorrt runs on every card that has
# compute capability 7.5 or more; TensorRT-RTX, which is on PyPI, takes its place on some of them.
.venv-gpu/ready: PIP := .venv-gpu/bin/pip install --quiet
.venv-gpu/ready: CAPABILITY = nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1
.venv-gpu/ready: pyproject.toml constraints.txt
	@nvidia-smi > /dev/null 2>&1 || { echo "no NVIDIA driver or GPU: nvidia-smi does not run"; exit 1; } >&2
	@command -v nvcc > /dev/null || { echo "no nvcc on the PATH: PyCUDA is compiled with the CUDA toolkit"; exit 1; } >&2
	@echo "Setting up .venv-gpu (minutes the first time: it installs PyTorch, CUDA and TensorRT)"
	@test -d .venv-gpu || $(PYTHON) -m venv .venv-gpu
	$(PIP) --constraint constraints.txt --editable ".[cuda,export,calibrate,gpu]"
	$(PIP) 'tensorrt>=10.1' || case "$$($(CAPABILITY))" in \
	7.5|8.6|8.9|12.*) echo "NVIDIA's tensorrt can't be installed: TensorRT-RTX takes its place" && $(PIP) --constraint constraints.txt tensorrt-rtx ;; \
	*) echo "NVIDIA's tensorrt can't be installed, which this GPU needs (compute capability $$($(CAPABILITY)))" >&2; exit 1 ;; esac
	@touch $@
