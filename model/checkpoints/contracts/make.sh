#!/usr/bin/env bash
# Makes the default checkpoint, in a clone: make.sh CONTRACTS PROSE OUT. Three trainings from the base, beside no
# other texts and beside two numbers of them, and the mean of their weights.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
contracts=$1 prose=$2 out=$3

run() {  # BOOKS STEPS STEPS-BETWEEN-EVALUATIONS CHOOSE-BY
  local data=$contracts
  if [ "$1" -gt 0 ]; then
    data=$out/data-$1
    PYTHONPATH=$here/../../.. python -m benchmarks.with_prose "$contracts" "$prose" "$data" "$1"
  fi
  sed -e "s/^steps = .*/steps = $2/" -e "s/^evaluate_every = .*/evaluate_every = $3/" \
    -e "s/^choose_by = .*/choose_by = \"$4\"/" "$here/training.toml" >"$out/run-$1.toml"
  gma train --data "$data" --out "$out/run-$1" --config "$out/run-$1.toml" --from base
}

mkdir -p "$out"
run 60 340 85 average_precision
run 117 400 80 average_precision
run 0 300 100 micro_f1
gma average "$out"/run-{60,117,0}/checkpoint --data "$out/data-60" --out "$out/contracts"
