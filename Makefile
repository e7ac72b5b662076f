# Two commands do everything on a machine with python3 >= 3.11, g++ and make: `make demo` and `make test`.
# Both make the environment in .venv and compile the extension first; both are safe to repeat, and quick then.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/pip --disable-pip-version-check

# Not in constraints.txt: a CUDA build of torch requires the triton that it was built with.
TRITON   := triton==3.9.0
EXTRAS   := recommender,tensorboard,triton,test,dev
CXX_CODE := $(shell find csrc tests examples -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
SOURCES  := $(CXX_CODE) $(wildcard build_backend/*.py)
FOLDERS  := $(shell find csrc -type d)  # their times change when a file comes or goes
# The tests that go through the kernels, for the runs under one tier and under the sanitizers.
OP_TESTS := $(wildcard $(foreach op,target_attention softmax_score catalog,tests/test_$(op)*.py))

# What else says something of the Triton kernels.
GPU_TESTS := $(OP_TESTS) $(addprefix tests/,test_op_registration.py test_checks.py test_functional.py test_compile.py test_kernels_memory.py)

.PHONY: help env build test tiers test-triton test-emulated test-gpu aot lint sanitize amx aarch64 oldest demo bench clean
.DELETE_ON_ERROR:

help: ## this list
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 15

# Torch and the build tools first: the extension is compiled against this torch, not against one that pip would
# fetch for an isolated build.
$(VENV)/tools: constraints.txt
	@echo "== environment: torch and build tools into $(VENV) (a minute or two the first time)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "attnrec needs Python 3.11 or newer; this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt torch numpy 'setuptools>=77' wheel ninja
	@touch $@

build/extension: $(VENV)/tools setup.py $(SOURCES) $(FOLDERS)
	@echo "== extension: compiling what changed"
	$(BIN)/python setup.py -q build_ext --inplace
	@mkdir -p build && touch $@

build: build/extension ## compile attnrec/_C and libattnrec_ops.so in place; only what changed

$(VENV)/installed: build/extension pyproject.toml constraints.txt
	@echo "== environment: attnrec (editable) and its extras"
	@$(BIN)/python -c 'import triton' 2>/dev/null || $(PIP) install -q $(TRITON)
	$(PIP) install -q -c constraints.txt --no-build-isolation -e '.[$(EXTRAS)]'
	@touch $@

env: $(VENV)/installed ## the whole environment, extension included

test: env lint aot ## environment, build, lint and all tests, those of the ops once per CPU tier, emulated AMX and runner
	@echo "== tests: all, on this machine's best CPU tier"
	$(BIN)/pytest -q --ignore tests/ptxemu
	@$(MAKE) --no-print-directory tiers amx test-triton test-emulated

# A process each, because the choice is made once in a process.
tiers: env ## the ops' tests once for each lower CPU tier of this machine
	@set -e; for tier in $$($(BIN)/python -c 'from attnrec._extension import extension as e; print(*[t for t in e.tiers_available() if t != e.tier_name()])'); do \
	  echo "== tests: the ops on CPU tier $$tier"; \
	  ATTNREC_CPU_TIER=$$tier $(BIN)/pytest -q $(OP_TESTS); \
	done

# The same tests on other runners (tests/runners.py). Slow ones, so on all cores.
ON_ALL_CORES := OMP_NUM_THREADS=1 $(BIN)/pytest -q -n auto --dist worksteal
test-triton: env ## the ops' tests on the Triton kernels in Triton's interpreter (ATTNREC_TEST_FULL=1: all cases)
	@echo "== tests: the ops, Triton kernels interpreted"
	ATTNREC_TEST_RUNNER=interpreter $(ON_ALL_CORES) $(GPU_TESTS)

NVCC := $(or $(wildcard $(CUDA_HOME)/bin/nvcc),$(shell command -v nvcc),$(wildcard /usr/local/cuda/bin/nvcc))
test-emulated: env ## the same on the GPU kernels as compiled for sm_80, executed by an emulator, and its own tests
	@echo "== tests: the ops, Triton kernels compiled for sm_80 and emulated"
	$(ON_ALL_CORES) tests/ptxemu
	ATTNREC_TEST_RUNNER=emulator $(ON_ALL_CORES) $(OP_TESTS) tests/test_kernels_memory.py
	@echo "== tests: the ops, CUDA C++ kernels compiled for sm_80 and emulated$(if $(NVCC),,: not run, there is no nvcc)"
	$(if $(NVCC),ATTNREC_TEST_RUNNER=cuda-emulator $(ON_ALL_CORES) $(OP_TESTS) tests/test_kernels_memory.py)

test-gpu: env ## the same on this machine's GPU, and what only a GPU can say
	@echo "== tests: the ops, on the GPU"
	ATTNREC_TEST_RUNNER=device $(BIN)/pytest -q $(GPU_TESTS) tests/test_gpu.py

lint: env ## ruff and clang-format
	@echo "== lint"
	$(BIN)/ruff check -q .
	$(BIN)/ruff format -q --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_CODE)

# Without --subset everything is compiled, with --subset alone all pairs of options.
aot: env ## compile the GPU kernels for sm_80, 90 and 100, Triton's where they are most likely to spill; no GPU needed
	@echo "== Triton kernels: compiled ahead of time"
	OMP_NUM_THREADS=1 $(BIN)/python -m attnrec.kernels.aot --subset riskiest
	@echo "== CUDA C++ kernels: compiled ahead of time"
	$(ON_ALL_CORES) tests/test_cuda_compile.py

# In a folder of its own (Python files copied, extension beside them), so that the normal build stays as it is.
SANITIZED := build/sanitize/lib
sanitize: env ## the ops' tests on kernels built with address and undefined-behaviour sanitizers
	@echo "== sanitizers: compiling"
	ATTNREC_SANITIZE=1 ATTNREC_CUDA=off $(BIN)/python setup.py -q build --build-base build/sanitize --build-lib $(SANITIZED)
	@echo "== sanitizers: the ops' tests"
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 ATTNREC_EXPECT_SANITIZED=1 \
	  ATTNREC_TEST_EXAMPLES=5 PYTHONPATH=$(SANITIZED) $(BIN)/pytest -q -p no:cacheprovider $(OP_TESTS)

# AMX's tier on a processor without it: its vectors are the processor's own, its tile instructions a stand-in's.
EMULATED_AMX := build/amx/lib
build/amx/tiles: tests/standalone/tiles.cpp $(wildcard csrc/cpu/tiers/*.h)
	@mkdir -p build/amx
	$(CXX) -std=c++20 -O2 -ffp-contract=off -Wall -Werror -Wno-psabi -Icsrc $< -o $@

amx: env build/amx/tiles ## the ops' tests on the AMX tier, its tile instructions emulated (needs AVX512_BF16)
	@echo "== AMX, emulated: compiling"
	ATTNREC_AMX=emulated ATTNREC_CUDA=off $(BIN)/python setup.py -q build --build-base build/amx --build-lib $(EMULATED_AMX)
	@echo "== AMX, emulated: tests of the stand-in, and the ops'"
	build/amx/tiles
	@if PYTHONPATH=$(EMULATED_AMX) $(BIN)/python -P -c 'from attnrec._extension import extension as e; exit("amx_bf16" not in e.tiers_available())'; then \
	  ATTNREC_CPU_TIER=amx_bf16 ATTNREC_EXPECT_EMULATED_AMX=1 ATTNREC_TEST_EXAMPLES=5 PYTHONPATH=$(EMULATED_AMX) \
	    $(BIN)/pytest -q -p no:cacheprovider $(OP_TESTS); \
	else echo "compiled; not run: beside tiles the tier needs AVX512_BF16, which this processor lacks"; fi

# All of csrc/cpu for another architecture, where no tier with intrinsics exists; torch's headers are the same there.
CXX_AARCH64   ?= aarch64-linux-gnu-g++
AARCH64_FLAGS := -std=c++20 -O2 -ffp-contract=off -fvisibility=hidden -Wall -Werror -Wno-psabi -Icsrc
AARCH64       := $(patsubst csrc/%.cpp,build/aarch64/%.o,$(shell find csrc/cpu -name '*.cpp'))
build/aarch64/%.o: csrc/%.cpp $(CXX_CODE) | $(VENV)/tools
	@mkdir -p $(dir $@)
	$(CXX_AARCH64) $(AARCH64_FLAGS) -DTORCH_TARGET_VERSION=0x020b000000000000 \
	  $$($(BIN)/python -c 'from torch.utils.cpp_extension import include_paths as p; print(*["-isystem " + d for d in p()])') -c $< -o $@

# The kernels need no torch, so that a program of them runs in an emulator.
STANDALONE := build/aarch64/target_attention
$(STANDALONE): tests/standalone/target_attention.cpp $(AARCH64)
	$(CXX_AARCH64) $(AARCH64_FLAGS) -static $< $(filter build/aarch64/cpu/tiers/%,$(AARCH64)) -o $@

aarch64: $(VENV)/tools $(STANDALONE) ## compile csrc/cpu for aarch64, run it in qemu (Debian: g++-aarch64-linux-gnu, qemu-user)
	@if command -v qemu-aarch64 >/dev/null; then qemu-aarch64 $(STANDALONE); else echo "compiled; not run: there is no qemu-aarch64"; fi

oldest: env ## compile the C++ sources against the headers of the oldest torch that is supported, downloaded for it
	$(BIN)/python tests/standalone/oldest_torch.py

demo: env ## environment, build, then the recommender on MovieLens-100k, into runs/demo
	$(BIN)/python -m attnrec.recommender.demo --out runs/demo

$(VENV)/bench: $(VENV)/installed
	@echo "== environment: the engines that the benchmarks compare with"
	$(PIP) install -q -c constraints.txt --no-build-isolation -e '.[bench]'
	@touch $@

SUITE := standard
bench: $(VENV)/bench ## the benchmarks with all peers (SUITE=smoke|standard|full|growth), into runs/bench
	@mkdir -p runs/bench
	$(BIN)/python -m benches --suite $(SUITE) --json runs/bench/$(SUITE).json --report runs/bench/$(SUITE)

clean: ## remove what the build made; the environment stays
	rm -rf build dist attnrec.egg-info attnrec/_C*.so attnrec/libattnrec_ops.so
