#!/usr/bin/env bash
# From a fresh machine with 80 GB GPUs to the README's tables (four: half an hour):
#   git clone REPOSITORY && cd infinite-context && bash slurm/speedrun.sh
# Installs, trains infinitecontext_1b, evaluates it on its own grid, writes docs/results and the
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

start=()
for stage in ${SPEEDRUN_STAGES:-infinitecontext_1b}; do
  run=runs/$stage/speedrun
  if [[ ! -f $run/results.json ]]; then
    "$IC_PYTHON" -m ic fit "experiment=$stage" run_id=speedrun ckpt_path=auto \
      callbacks.passkey.at_end=false "${start[@]}" "$@"
  fi
  "$IC_PYTHON" -m ic evaluate "run=$run" "output=$run/passkey"
  cp "$run/results.json" "docs/results/$stage-fit.json"
  cp "$run/passkey/results.json" "docs/results/$stage-passkey.json"
  start=("model.init_from=$run/checkpoints/last")
done
"$IC_PYTHON" -m ic tables
