# shellcheck shell=bash
# Sourced by every sbatch file of this folder: environment, rendezvous, and `ic` under srun.
# Submit from the root of the repository; SLURM runs a copy of the script from elsewhere.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit with sbatch}"

if [[ -z ${IC_PYTHON:-} ]]; then
  if [[ -x .venv/bin/python ]]; then IC_PYTHON=.venv/bin/python; else IC_PYTHON=python3; fi
fi

# The address SLURM itself uses for the first node: host names need not resolve on compute nodes.
first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_ADDR=$(scontrol show node "$first_node" --oneliner | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 12000))  # below the range of ephemeral ports
export MASTER_ADDR MASTER_PORT
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}

# A job id survives a requeue, so the run directory does too; `run_id=` on the command line wins.
if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
  RUN_ID=$SLURM_ARRAY_JOB_ID-$SLURM_ARRAY_TASK_ID
else
  RUN_ID=$SLURM_JOB_ID
fi

echo "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, restart ${SLURM_RESTART_COUNT:-0}, run_id $RUN_ID"

# One process a task. A rank that fails takes the others along at once instead of letting them
# wait for it. USR1 is ignored until Python has its handler, so that an early one kills nothing.
run_ic() {
  srun --kill-on-bad-exit=1 env --ignore-signal=USR1 "$IC_PYTHON" -m ic "$@"
}

# For work that keeps its own progress on disk and has no handler: the batch shell requeues.
run_ic_requeued_by_shell() {
  local max_restarts=20
  trap '[[ ${SLURM_RESTART_COUNT:-0} -lt $max_restarts ]] && scontrol requeue "$SLURM_JOB_ID"' USR1
  run_ic "$@" &
  local step=$!
  # The trap ends a `wait` early; the shell remembers the step's own exit code for the last one.
  while kill -0 "$step" 2>/dev/null; do wait "$step" || true; done
  wait "$step"
}
