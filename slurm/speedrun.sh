#!/usr/bin/env bash
# From a fresh machine with one 80 GB GPU to the README's tables:
#   git clone REPOSITORY && cd infinite-context && bash slurm/speedrun.sh
# Installs, trains the ladder up to mla_1m, each stage from the one before, evaluates each on its
# experiment's own grid, writes docs/results and the tables. Arguments are overrides of every `fit`.
# Run it again after an interruption: what is done is kept, the rest continues.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ -z ${IC_PYTHON:-} ]]; then
  make .venv/.run
  IC_PYTHON=.venv/bin/python
fi
"$IC_PYTHON" -m ic doctor

# Hydra overrides for the evaluation grid that a run was configured with.
grid_of() {
  "$IC_PYTHON" - "$1" <<'PYTHON'
import sys
import yaml

def hydra(value):
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{hydra(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(hydra, value)) + "]"
    return "null" if value is None else str(value)

with open(sys.argv[1]) as file:
    for key, value in yaml.safe_load(file)["evaluation"].items():
        print(f"++evaluation.{key}={hydra(value)}")
PYTHON
}

start=()
for stage in ${SPEEDRUN_STAGES:-mla_32k mla_128k mla_1m}; do
  run=runs/$stage/speedrun
  if [[ ! -f $run/results.json ]]; then
    "$IC_PYTHON" -m ic fit "experiment=$stage" run_id=speedrun ckpt_path=auto \
      callbacks.passkey.at_end=false "${start[@]}" "$@"
  fi
  mapfile -t grid < <(grid_of "$run/config.yaml")
  "$IC_PYTHON" -m ic evaluate "checkpoint=$run/checkpoints/last" "output=$run/passkey" "${grid[@]}"
  cp "$run/results.json" "docs/results/$stage-fit.json"
  cp "$run/passkey/results.json" "docs/results/$stage-passkey.json"
  start=("model.init_from=$run/checkpoints/last")
done
"$IC_PYTHON" -m ic.tables
