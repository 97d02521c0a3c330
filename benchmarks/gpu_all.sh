#!/usr/bin/env bash
# bash benchmarks/gpu_all.sh [FOLDER]     all measurements of one accelerator, in under 9 minutes; results in FOLDER or $OUT
# bash benchmarks/gpu_all.sh --rehearse   the same parts at tiny shapes on a CPU
# bash benchmarks/gpu_all.sh --list       the parts and their time limits
#
# PYTHON is the python with jax (python3 unless set), TORCH_PYTHON one with torch and transformers (PYTHON unless set);
# CORPUS a prepared corpus and CHECKPOINT a run trained on it, for the time of an evaluation (left out unless both are there).
set -uo pipefail

folder=${OUT:-results}
mode=run
for argument in "$@"; do
  case $argument in
    --rehearse | --list) mode=${argument#--} ;;
    -h | --help) sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit 0 ;;
    -*) echo "error: $argument: unknown; see --help" >&2 && exit 2 ;;
    *) folder=$argument ;;
  esac
done
[ "$mode" = list ] || mkdir -p "$folder" || exit 2
folder=$(realpath -m "$folder")
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
torch_python=${TORCH_PYTHON:-$python}

# The tests' own settings keep them on the CPU: left out, the one for kernels of a device runs where JAX would.
tests=(--noconftest -p no:cacheprovider -k kernels_of_this_device tests/model/test_attention.py)
train=(--windows 5 --steps 10 --vocabulary 44902)
data=()
sample=()
checkpoint=(--windows 3)
compare=(--windows 5 --steps 10)
backends=(cudnn pallas xla)
if [ "$mode" = rehearse ]; then
  export JAX_PLATFORMS=cpu
  tests=(tests/model/test_attention.py)
  tiny=(--vocabulary 300 --sets 500 --windows 2 --model.num-layers 1 --model.width 32 --model.num-heads 2
    --training.batch-rows 4 --training.row-length 64 --training.segments-per-row 8)
  train=(--steps 2 "${tiny[@]}")
  data=(--steps 4 "${tiny[@]}")
  sample=(--steps 2 --batch 4 "${tiny[@]}")
  checkpoint=("${tiny[@]}")
  compare=(--shape tiny --windows 2 --steps 2 --residuals float32 bfloat16)
  backends=(xla)
fi
if [ "$mode" = run ]; then
  # Parts of one shape share what XLA found out about its products on this device.
  JAX_COMPILATION_CACHE_DIR=$(mktemp -d) || exit 2
  export JAX_COMPILATION_CACHE_DIR
  trap 'rm -rf "$JAX_COMPILATION_CACHE_DIR"' EXIT
fi
failed=()
# All parts together; 9 minutes with a margin.
readonly TOTAL=525

# part NAME SECONDS COMMAND..: runs it with a time limit; what hangs or fails does not stop the others.
part() {
  local name=$1 limit=$2 began=$SECONDS code
  shift 2
  if [ "$mode" = list ]; then
    printf '%-16s %3s s  %s\n' "$name" "$limit" "$*"
    return
  fi
  if [ "$mode" = rehearse ]; then
    limit=$((5 * limit))
  elif [ $((TOTAL - SECONDS)) -lt "$limit" ]; then
    limit=$((TOTAL - SECONDS))
  fi
  if [ "$limit" -lt 5 ]; then
    failed+=("$name (no time left)")
    return
  fi
  timeout --kill-after=5 "$limit" "$@" >"$folder/$name.log" 2>&1 </dev/null
  code=$?
  if [ $code = 0 ]; then
    echo "== $name: $((SECONDS - began)) s"
    tail -n 30 "$folder/$name.log"
  else
    failed+=("$name (exit $code$([ $((SECONDS - began)) -ge "$limit" ] && echo ', out of time'))")
    echo "== $name: FAILED, exit $code after $((SECONDS - began)) s"
    tail -n 12 "$folder/$name.log"
  fi
}

bench() {
  local name=$1 limit=$2
  shift 2
  part "$name" "$limit" "$python" -m tcc_jax.bench "$@" --json "$folder/$name.json"
}

part attention-tests 75 "$python" -m pytest "${tests[@]}"
# Where JAX finds no GPU, pytest skips them all and is content.
if [ "$mode" = run ] && ! grep -Eq '[0-9]+ passed' "$folder/attention-tests.log"; then
  failed+=("attention-tests (none ran: does JAX find the GPU?)")
fi
for backend in "${backends[@]}"; do
  bench "train-$backend" 60 train "${train[@]}" --compute.attention "$backend"
done
bench train-residual 60 train "${train[@]}" --compute.attention "${backends[0]}" --model.residual-dtype bfloat16
bench train-cut-points 60 train "${train[@]}" --objective.cut-points 2
part compare-pytorch 240 "$python" benchmarks/compare_pytorch.py --json "$folder/compare-pytorch.json" \
  --torch-python "$torch_python" "${compare[@]}"
# Do these compiler flags pay? Beside train-${backends[0]}: cuBLAS alone for products, no CUDA graphs, Triton for all.
flags() {
  XLA_FLAGS="${XLA_FLAGS:-} $2" bench "train-$1" 60 train "${train[@]}" --compute.attention "${backends[0]}"
}
flags no-triton --xla_gpu_enable_triton_gemm=false
flags no-graphs --xla_gpu_enable_command_buffer=
flags triton-any --xla_gpu_triton_gemm_any=true
bench data 30 data "${data[@]}"
bench sample 120 sample "${sample[@]}"
bench checkpoint 45 checkpoint "${checkpoint[@]}"
if [ "$mode" != rehearse ] && [ -e "${CORPUS:-/nowhere}" ] && [ -e "${CHECKPOINT:-/nowhere}" ]; then
  part eval 60 bash -c '"$0" -m tcc_jax.eval --checkpoint "$1" --corpus "$2" --out "$3" --limit 1000 --overwrite \
    && echo "{\"measure\": \"eval\", \"results\": {\"seconds\": $SECONDS}}" >"$3.json"' \
    "$python" "$CHECKPOINT" "$CORPUS" "$folder/eval"
fi

[ "$mode" = list ] && exit 0
echo
echo "$SECONDS s in all; results in $folder"
if [ ${#failed[@]} -gt 0 ]; then
  printf 'failed: %s\n' "${failed[@]}"
  exit 1
fi
