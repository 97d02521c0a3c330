#!/usr/bin/env bash
# bash benchmarks/speedrun_all.sh [FOLDER]     the time to quality on one accelerator, in under 10 minutes; results in
#                                              FOLDER or $OUT, files over 15 MiB in pieces
# bash benchmarks/speedrun_all.sh --rehearse   all of it on a CPU, with tiny models and few steps
#
# PACKED is a corpus packed by benchmarks/pack_corpus.py, or CORPUS a prepared one; GMT are the reference sets and COUNTS
# their published tables. PYTHON is the python with jax (python3 unless set), TORCH_PYTHON one with torch and transformers
# (PYTHON unless set; without them that part is left out and said to be). LIMIT is the time in seconds (570 unless set),
# PARTS what is run ("jax torch" unless set): where both are, PyTorch takes as many steps as there is time left for.
set -uo pipefail

folder=${OUT:-results}
mode=run
for argument in "$@"; do
  case $argument in
    --rehearse) mode=rehearse ;;
    -h | --help) sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit 0 ;;
    -*) echo "error: $argument: unknown; see --help" >&2 && exit 2 ;;
    *) folder=$argument ;;
  esac
done
limit=${LIMIT:-570} parts=" ${PARTS:-jax torch} "
python=${PYTHON:-python3}
torch_python=${TORCH_PYTHON:-$python}
for name in GMT COUNTS; do
  [ -f "${!name:-}" ] || { echo "error: $name: must name a file; see --help" >&2 && exit 2; }
done
[ -f "${PACKED:-}" ] || [ -d "${CORPUS:-}" ] || { echo "error: PACKED or CORPUS is needed; see --help" >&2 && exit 2; }
mkdir -p "$folder" || exit 2
folder=$(realpath "$folder") gmt=$(realpath "$GMT") counts=$(realpath "$COUNTS")
[ -f "${PACKED:-}" ] && packed=$(realpath "$PACKED")
[ -d "${CORPUS:-}" ] && corpus=$(realpath "$CORPUS")
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
work=$(mktemp -d) || exit 2
trap 'rm -rf "$work"' EXIT
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$work/compilations}
failed=()
every=100 start=device tiny=() tiny_torch=()
if [ "$mode" = rehearse ]; then
  export JAX_PLATFORMS=cpu CUDA_VISIBLE_DEVICES=
  limit=$((3 * limit)) every=4 start=host
  tiny=(num_layers=1 width=32 num_heads=2 hidden_width=32 'matmul_dtype="float32"' steps=20 batch_rows=32 warmup_steps=4
    recall_sets=64 log_every=5)
  tiny_torch=(num_layers=1 width=32 num_heads=2 steps=12 batch_rows=4 row_length=128 warmup_steps=4)
elif ! "$python" -c 'import jax; assert jax.default_backend() != "cpu"' 2>/dev/null; then
  echo "error: $python: JAX finds no accelerator; --rehearse runs on a CPU" >&2 && exit 2
fi

left() { echo $((limit - SECONDS)); }

# part NAME SECONDS COMMAND..: runs it with a time limit; what hangs or fails does not stop the others.
part() {
  local name=$1 most=$2 began=$SECONDS code
  shift 2
  if [ "$most" -lt 5 ]; then
    failed+=("$name (no time left)")
    return 1
  fi
  timeout --kill-after=5 "$most" "$@" >"$folder/$name.log" 2>&1 </dev/null
  code=$?
  if [ $code = 0 ]; then
    echo "== $name: $((SECONDS - began)) s"
    return 0
  fi
  failed+=("$name (exit $code$([ $((SECONDS - began)) -ge "$most" ] && echo ', out of time'))")
  echo "== $name: FAILED, exit $code after $((SECONDS - began)) s"
  tail -n 12 "$folder/$name.log"
  return 1
}

# make_config NAME [KEY=VALUE..]: configs/NAME.toml with this corpus, in this place, and with other values.
make_config() {
  local name=$1 edits=(-e "s|^corpus = .*|corpus = \"$corpus\"|" -e "s|^directory = .*|directory = \"$work/$1\"|") pair
  for pair in "${@:2}"; do
    edits+=(-e "s|^${pair%%=*} = .*|${pair%%=*} = ${pair#*=}|")
  done
  sed "${edits[@]}" "configs/$name.toml" >"$folder/$name.toml"
}

# speedrun NAME MODULE SECONDS [ARGUMENT..]: one side of the comparison, its table shown; it is to end by itself, with time
# for the last measurement.
speedrun() {
  local name=$1 module=$2 most=$3
  shift 3
  part "$name" "$most" "$python" -m "$module" "$folder/$name.toml" --gmt "$gmt" --drawn-counts "$counts" \
    --out "$folder/$name.json" --every "$every" --limit $((most > 46 ? most - 45 : 1)) "$@" || return 1
  sed -n '/^| passes/,$p' "$folder/$name.log" | tee "$folder/$name.md"
}

if [ -z "${corpus:-}" ]; then
  corpus=$work/corpus
  part unpack "$(left)" "$python" -m benchmarks.pack_corpus unpack "$packed" "$corpus" || exit 1
fi
has_torch='' reserved=15
if [[ $parts = *" torch "* ]]; then
  if "$torch_python" -c 'import torch, transformers' 2>/dev/null; then
    has_torch=yes reserved=215
  else
    echo "== speedrun_pytorch: left out, $torch_python has no torch and transformers"
  fi
fi

if [[ $parts = *" jax "* ]]; then
  make_config speedrun "${tiny[@]}"
  run_jax() { speedrun speedrun benchmarks.speedrun $(($(left) - reserved)) --start "$start"; }
  if ! run_jax && grep -q 'output tile sizes' "$folder/speedrun.log" && [ "$(left)" -gt 120 ]; then
    # Of JAX 0.10.2 ahead of time; on a device XLA is thought to drop what it cannot compile.
    echo "== once more without Triton's products"
    mv "$folder/speedrun.log" "$folder/speedrun-triton.log"
    rm -rf "$work"/speedrun*
    failed=()
    XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_enable_triton_gemm=false" run_jax
  fi
  for name in metrics.jsonl config.json; do
    [ -f "$work/speedrun/$name" ] && cp "$work/speedrun/$name" "$folder/speedrun-$name"
  done
  [ -d "$work/speedrun-export" ] && rm -rf "$folder/export" && cp -r "$work/speedrun-export" "$folder/export"
fi

if [ -n "$has_torch" ]; then
  steps=()
  if [ "$mode" = run ]; then
    # 350,000 tokens a second, 65,536 a step; the rest is for compilation and measurements.
    fit=$((($(left) - 150) * 350000 / 65536))
    [ "$fit" -lt 100 ] && fit=100
    [ "$fit" -lt 2000 ] && steps=(--steps "$fit")
  fi
  make_config speedrun_pytorch "${tiny_torch[@]}"
  speedrun speedrun_pytorch benchmarks.speedrun_pytorch $(($(left) - 10)) --torch-python "$torch_python" "${steps[@]}"
fi

# What comes back from such a machine may be limited by file; cat PIECES >FILE puts one together.
while IFS= read -r file; do
  (cd "$(dirname "$file")" && name=$(basename "$file") && sha256sum "$name" >"$name.sha256" &&
    split --bytes=15M --numeric-suffixes "$name" "$name.part-" && rm "$name")
done < <(find "$folder" -type f -size +15M)
echo
echo "$SECONDS s in all; results in $folder"
if [ ${#failed[@]} -gt 0 ]; then
  printf 'failed: %s\n' "${failed[@]}"
  exit 1
fi
