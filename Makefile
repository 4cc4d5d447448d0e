# Every target sets itself up: it makes .venv, installs the pinned, tested versions, builds and runs.
# `make test-gpu` and `make bench-gpu` use the Python of the GPU machine instead (PYTHON=...).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
JOBS ?= $(shell nproc)# processes of the tests
OLDEST := $(VENV)/oldest-triton

.PHONY: help demo results study study-report test test-all test-gpu test-hub-old docs kernels-check kernels-model host-time static asan lint bench bench-gpu dist clean

help: ## what the targets do
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 18

$(STAMP): $(wildcard requirements/*.txt) pyproject.toml setup.py $(wildcard csrc/* csrc/*/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -r requirements/pinned.txt
	$(BIN)/pip install --quiet --no-deps --upgrade --target $(VENV)/beside -r requirements/no-deps.txt
	$(BIN)/pip install --quiet --no-deps --upgrade --target $(OLDEST) -r requirements/oldest-triton.txt
	$(BIN)/pip install --quiet --no-build-isolation --no-deps -e .
	touch $@

demo: $(STAMP) ## train a ViT end to end and block by block on handwritten digits, print one table
	$(BIN)/python -m benchmarks.study demo

results: $(STAMP) ## the full recipe with 3 seeds; finished runs are kept; rewrites docs/results.md
	$(BIN)/python -m benchmarks.study results

study: $(STAMP) ## hours: every method, ablation and budget; goes on where it was (STUDY="--quick": minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.study study $(STUDY)

study-report: $(STAMP) ## build/study.html, docs/results.md, README and pictures from the records; runs nothing
	$(BIN)/python -m benchmarks.study report

test: $(STAMP) ## the whole default test suite, in Triton's interpreter where there is no GPU
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile

test-all: $(STAMP) ## the whole default test suite, and the tests that take minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile -m ""

# In several processes where PYTHON has pytest-xdist; most of the time goes to compiling kernels.
GPU_TESTS := tests/kernels tests/ops tests/models tests/integrations tests/blocks tests/sampling
test-gpu: ## the tests that a GPU can run, with the packages of PYTHON; what is missing is named
	@$(PYTHON) -c "import xdist" || echo "no pytest-xdist for $(PYTHON): one process, not $(JOBS)"
	PYTHONPATH=. OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q -rs $(GPU_TESTS) \
		$$($(PYTHON) -c "import xdist; print('-n $(JOBS) --dist worksteal')" 2>/dev/null)

test-hub-old: $(STAMP) ## convert and fuse_ with old versions of transformers, timm and diffusers
	$(BIN)/pip install --quiet --no-deps --upgrade --target build/hub-old -r requirements/hub-old.txt
	PYTHONPATH=build/hub-old $(BIN)/python -m pytest -q tests/integrations \
		tests/blocks/test_conventions.py --ignore tests/integrations/convert/test_find.py

docs: ## the documentation as a site in build/site; a warning is an error
	test -x build/docs-venv/bin/python || $(PYTHON) -m venv build/docs-venv
	build/docs-venv/bin/pip install --quiet -r requirements/docs.txt
	build/docs-venv/bin/mkdocs build --strict

kernels-check: $(STAMP) ## compile every kernel for five GPU architectures, with the oldest and the pinned Triton
	PYTHONPATH=$(OLDEST) $(BIN)/python -m benchmarks.kernels.check --once
	$(BIN)/python -m benchmarks.kernels.check

kernels-model: $(STAMP) ## what a cycle model of an H200 says of each kernel, beside the goals; no GPU
	$(BIN)/python -m benchmarks.kernels.model

host-time: $(STAMP) ## microseconds of the host a call, beside eager PyTorch and Liger; no GPU
	$(BIN)/python -m benchmarks.kernels.model host

static: $(STAMP) ## registers, instructions and launch settings of every kernel: benchmarks/static.md
	$(BIN)/python -m benchmarks.kernels.static

asan: $(STAMP) ## the tests of the C++ ops under the address and undefined-behaviour sanitizers
	rm -rf build/asan && mkdir -p build/asan
	cp -a dblocks kernels csrc tests setup.py pyproject.toml README.md LICENSE build/asan
	cd build/asan && rm -f dblocks/*.so && DBLOCKS_SANITIZE=1 DBLOCKS_REQUIRE_EXT=1 \
		../../$(BIN)/python setup.py -q build_ext --inplace
	cd build/asan && PYTHONPATH=. ASAN_OPTIONS=detect_leaks=0 \
		LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
		../../$(BIN)/python -m pytest -q tests/ops -k "cpp and not compile" -p no:cacheprovider

lint: $(STAMP) ## formatting, lint, types and spelling
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/codespell $$(git ls-files '*.py' '*.md' '*.toml' Makefile)

bench: $(STAMP) ## every op and a training step beside their baselines, each checked before it is timed
	$(BIN)/python -m benchmarks.ops.run --memory --out benchmarks/results
	$(BIN)/python -m benchmarks.models.step --out benchmarks/results
	$(BIN)/python -m benchmarks.models.fuse --out benchmarks/results/fuse
	$(BIN)/python -m benchmarks.models.finetune --out benchmarks/results/finetune

# Five minutes: 150 s of ops, the rest for steps; `timeout` ends what takes longer, rows are kept.
BUDGET ?= 150
bench-gpu: ## the same on a GPU, 64M elements in bfloat16, with the packages of PYTHON, in 5 minutes
	PYTHONPATH=. timeout 200 $(PYTHON) -m benchmarks.ops.run --device cuda --rounds 5 \
		--budget $(BUDGET) --out benchmarks/results || test $$? -eq 124
	PYTHONPATH=. timeout 45 $(PYTHON) -m benchmarks.models.step --device cuda --rounds 5 \
		--out benchmarks/results || test $$? -eq 124
	PYTHONPATH=. timeout 50 $(PYTHON) -m benchmarks.models.fuse --device cuda --rounds 5 \
		--out benchmarks/results/fuse || test $$? -eq 124

# The wheel is built from the sdist; torch's own libraries stay torch's.
dist: $(STAMP) ## an sdist and an abi3 wheel with a manylinux tag, in dist/
	rm -rf dist build/dist
	$(BIN)/python setup.py -q sdist --dist-dir dist
	DBLOCKS_REQUIRE_EXT=1 $(BIN)/pip wheel --quiet --no-build-isolation --no-deps --wheel-dir build/dist dist/*.tar.gz
	PATH="$(BIN):$$PATH" $(BIN)/auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' \
		--wheel-dir dist build/dist/*.whl

clean: ## remove what the targets made
	rm -rf $(VENV) build dist runs *.egg-info .pytest_cache .hypothesis .ruff_cache
