#!/usr/bin/env bash
# gpu_check.sh: everything that only a CUDA machine can say, most important first, in at most 9 minutes.
#
# Needs Python with torch (2.11, cu130) and triton 3.6, and for the CUDA part nvcc and compute-sanitizer; no
# network. Results and logs go to $OUT, or to benches/results. What is not there is named, and is no failure;
# what is there and goes wrong is one.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-benches/results}
mkdir -p "$OUT"
start=$SECONDS
total=${GPU_CHECK_SECONDS:-540}
failed=()

say() { printf '== [%3d s] %s\n' $((SECONDS - start)) "$*"; }
missing() { say "not there: $*"; }

# step NAME SECONDS COMMAND...: runs it in what is left of the time, at most SECONDS; its output goes to a log.
step() {
  local name=$1 limit=$2 left=$((total - SECONDS + start))
  shift 2
  [ "$limit" -lt "$left" ] || limit=$left
  if [ "$limit" -lt 5 ]; then
    say "$name: left out, the time is up"
    return 0
  fi
  say "$name (at most $limit s)"
  timeout -k 5 "$limit" "$@" >"$OUT/gpu_check-$name.log" 2>&1
  local status=$?
  case $status in
    0) say "$name: ok" ;;
    124 | 137) say "$name: stopped after $limit s" && failed+=("$name (time)") ;;
    *) say "$name: FAILED ($status)" && tail -n 25 "$OUT/gpu_check-$name.log" && failed+=("$name") ;;
  esac
  return $status
}

ask() { "$PYTHON" -c "$1" 2>/dev/null; }

if ! ask 'import torch'; then
  missing "torch for $PYTHON; nothing to check"
  exit 0
fi

# --- build --------------------------------------------------------------------------------------------------
say "$(ask 'import sys, torch; print("Python", sys.version.split()[0], "torch", torch.__version__)')"
if ask 'import setuptools'; then
  step build 180 "$PYTHON" setup.py build_ext --inplace || exit 1
else
  missing "setuptools to build with; going on with what is built"
fi
"$PYTHON" -m attnrec.info 2>&1 | tee "$OUT/gpu_check-info.log"

has_gpu=$(ask 'import torch; print(int(torch.cuda.is_available()))')
# The backends made for a GPU that serve calls on this one.
live=$(ask '
import torch
from attnrec.info import backends
if torch.cuda.is_available():
    print(*(name for name, state in backends().items() if name in ("cuda", "triton") and state.startswith("live")))
')
[ "${has_gpu:-0}" = 1 ] || missing "a GPU that torch can use"
[ -n "$live" ] || missing "a backend of attnrec that serves CUDA tensors; the reference does"

# --- tests --------------------------------------------------------------------------------------------------
# Most of their time is Triton's compiler, which keeps what it compiled: on many cores, and a covering part first.
cores=()
ask 'import xdist' && cores=(-n "$(($(nproc) < 8 ? $(nproc) : 8))" --dist worksteal)
check() { ATTNREC_TEST_RUNNER=device step "$1" "$2" "$PYTHON" -m pytest -q "${cores[@]}" "${@:3}"; }
if ! ask 'import pytest, hypothesis'; then
  missing "pytest and hypothesis"
elif [ "${has_gpu:-0}" = 1 ]; then
  export ATTNREC_TEST_FULL=0
  check tests-attention 120 tests/test_target_attention.py tests/test_target_attention_backward.py
  check tests-gpu 60 tests/test_gpu.py tests/test_kernels_memory.py
  check tests-ops 120 tests/test_target_attention_weights.py tests/test_softmax_score.py tests/test_catalog_*.py
  check tests-torch 60 tests/test_op_registration.py tests/test_compile.py tests/test_functional.py tests/test_checks.py
  [[ " $live " == *" cuda "* ]] && ATTNREC_BACKEND=cuda check tests-cuda 120 tests/test_{target_attention,softmax_score,catalog_topk,catalog_cross_entropy}*.py
  unset ATTNREC_TEST_FULL
else
  missing "a GPU for the tests"
fi

# --- memory errors and races of the CUDA kernels ------------------------------------------------------------
if [ -z "$(find csrc -name '*.cu' -print -quit)" ]; then
  missing "CUDA kernels in csrc, so nothing for compute-sanitizer"
elif ! command -v compute-sanitizer >/dev/null; then
  missing "compute-sanitizer"
elif [ "${has_gpu:-0}" = 1 ] && [[ " $live " == *" cuda "* ]]; then
  for tool in memcheck racecheck; do
    ATTNREC_BACKEND=cuda step "sanitizer-$tool" 60 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      "$PYTHON" -m benches --suite smoke --device cuda --seconds 0
  done
else
  missing "a live CUDA backend to sanitize"
fi

# --- benchmarks: most important first, each with its own file, so that what was measured is kept --------------
if [ "${has_gpu:-0}" = 1 ] && [ -n "$live" ]; then
  bench() { step "bench-$1" "$2" "$PYTHON" -m benches --device cuda --seconds 0.5 --json "$OUT/gpu-$1.json" "${@:3}"; }
  bench smoke 60 --suite smoke
  bench table 120 --op target_attention --case table/
  bench jagged 90 --op target_attention --case log-normal/ --case zipf/ --case ikbo/ --case hstu
  bench train 90 --op target_attention --case train
  bench catalog 90 --op catalog_topk --suite standard
  bench loss 90 --op catalog_cross_entropy --suite standard
  bench request 60 --op target_attention --case request/
else
  missing "what the GPU benchmarks would measure"
fi

say "done"
if [ ${#failed[@]} -gt 0 ]; then
  say "went wrong: ${failed[*]}"
  exit 1
fi
