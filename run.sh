#!/usr/bin/env bash
# bash run.sh              set up, then prepare, train and evaluate on the embedded pathways (configs/embedded.toml)
# bash run.sh CONFIG.toml  the same for another run, on a corpus that is already prepared
# bash run.sh test         set up, then ruff, mypy and pytest
set -euo pipefail
# On Linux, large pages and keeping freed memory: XLA frees and takes hundreds of megabytes at every step (benchmarks/LOG.md).
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=33554432:glibc.malloc.trim_threshold=4000000000}
cd "$(dirname "${BASH_SOURCE[0]}")"

find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11; do
    if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  echo "error: Python 3.11 or newer is needed, found $(python3 --version 2>&1 || true); set PYTHON=/path/to/python3" >&2
  return 1
}

# Install once for each state of the project files: the stamp holds their checksums, its name the extras; more will do.
set_up() {
  local extras=$1 stamp python
  for stamp in .venv/.installed-*"$extras"*; do
    if [ -x .venv/bin/python ] && [ "$(cat "$stamp" 2>/dev/null)" = "$(cksum pyproject.toml constraints.txt)" ]; then
      return
    fi
  done
  stamp=".venv/.installed-$extras"
  python=$(find_python) || exit 2
  echo "setting up .venv with $("$python" --version)" >&2
  if [ ! -x .venv/bin/python ] && ! "$python" -m venv .venv; then
    rm -rf .venv
    echo "error: $python cannot make a virtual environment; install its venv package (Debian: python3-venv)" >&2
    exit 2
  fi
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$extras]"
  cksum pyproject.toml constraints.txt >"$stamp"
}

# What a configuration says, or its one-line error.
ask() {
  .venv/bin/python -c 'import sys
from tcc_jax.config import read_toml
from tcc_jax.terminal import command
command(lambda: print(getattr(getattr(read_toml(sys.argv[1]), sys.argv[2]), sys.argv[3])))()' "$@"
}

run() {
  local config=$1 corpus directory
  set_up plots
  corpus=$(ask "$config" data corpus)
  directory=$(ask "$config" run directory)
  if [ "$corpus" = corpora/embedded ] && [ ! -e "$corpus" ]; then
    echo "== prepare: Reactome to train on, WikiPathways as the unseen library" >&2
    .venv/bin/python -m tcc_jax.prepare --out "$corpus" --split library --test-library WikiPathways_MSigDB_7.5.1 \
      --validation-share 0.05 --gmt data/Reactome_MSigDB_7.5.1.gmt.xz data/WikiPathways_MSigDB_7.5.1.gmt.xz
  fi
  echo "== train: $config" >&2
  .venv/bin/python -m tcc_jax.train "$config"
  if ! grep -qs '"finished"' "$directory/status.json"; then
    echo "stopped before the last step; the same command goes on from there" >&2
    exit 130
  fi
  echo "== eval: the test split" >&2
  .venv/bin/python -m tcc_jax.eval --checkpoint "$directory" --out "$directory/report" --mixture --overwrite
  echo "the report is $PWD/$directory/report/report.html"
}

if [ $# -gt 1 ] && [ "$1" != test ]; then
  echo "error: one configuration at a time; for other settings run python -m tcc_jax.train $1 --section.field value" >&2
  exit 2
fi
case "${1:-}" in
  test)
    set_up dev,plots
    .venv/bin/ruff check .
    .venv/bin/ruff format --check .
    .venv/bin/mypy
    .venv/bin/python -m pytest -n 2 "${@:2}"
    ;;
  "") run configs/embedded.toml ;;
  -h | --help) sed -n '2,4s/^# //p' "${BASH_SOURCE[0]##*/}" ;;
  *)
    if [ ! -f "$1" ]; then
      echo "error: $1: no such configuration; give a TOML file such as configs/embedded.toml, or test" >&2
      exit 2
    fi
    run "$1"
    ;;
esac
