#!/usr/bin/env bash
# From a fresh machine with 80 GB GPUs to the README's tables (four: half an hour):
#   git clone REPOSITORY && cd infinite-context && bash slurm/speedrun.sh
# Installs, trains infinitecontext_1b, evaluates it on its experiment's own grid, writes docs/results and the
# tables. SPEEDRUN_STAGES="mla_32k mla_128k mla_1m" runs other experiments, each from the one before.
# Arguments are overrides of every `fit`; one GPU needs trainer.max_time=00:00:07:00.
# Run it again after an interruption: what is done is kept, the rest continues.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ -z ${IC_PYTHON:-} ]]; then
  make .venv/.run
  IC_PYTHON=.venv/bin/python
fi
"$IC_PYTHON" -m ic doctor

# Overrides of `evaluate` for the grid, attention and devices that a run was configured with.
evaluation_of() {
  "$IC_PYTHON" - "$1" <<'PYTHON'
import sys
import torch
import yaml

def hydra(value):
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{hydra(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(hydra, value)) + "]"
    return "null" if value is None else str(value)

with open(sys.argv[1]) as file:
    config = yaml.safe_load(file)
for key, value in config["evaluation"].items():
    print(f"++evaluation.{key}={hydra(value)}")
trainer = config["trainer"]
devices = trainer["devices"]
print(f"devices={devices if devices != 'auto' else max(1, torch.cuda.device_count())}")
print(f"accelerator={trainer['accelerator']}")
print(f"attention={config['model']['attention']}")
PYTHON
}

start=()
for stage in ${SPEEDRUN_STAGES:-infinitecontext_1b}; do
  run=runs/$stage/speedrun
  if [[ ! -f $run/results.json ]]; then
    "$IC_PYTHON" -m ic fit "experiment=$stage" run_id=speedrun ckpt_path=auto \
      callbacks.passkey.at_end=false "${start[@]}" "$@"
  fi
  mapfile -t evaluation < <(evaluation_of "$run/config.yaml")
  "$IC_PYTHON" -m ic evaluate "checkpoint=$run/checkpoints/last" "output=$run/passkey" "${evaluation[@]}"
  cp "$run/results.json" "docs/results/$stage-fit.json"
  cp "$run/passkey/results.json" "docs/results/$stage-passkey.json"
  start=("model.init_from=$run/checkpoints/last")
done
"$IC_PYTHON" -m ic tables
