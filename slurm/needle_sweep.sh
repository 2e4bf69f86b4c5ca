#!/usr/bin/env bash
# Which needle parameters help: a small model is fine-tuned on needle conversations (SFT), then on pairs (DPO),
# that differ in one parameter, three seeds each, for equal steps, and asked for one of nine keys.
#   bash slurm/needle_sweep.sh [overrides of every fit]                       # mla_small to 16k, GPUs
#   NEEDLE_SWEEP_SCALE=cpu bash slurm/needle_sweep.sh                         # 3 M parameters to 1k, CPU cores
# Everything lies below NEEDLE_SWEEP_DIR (runs/needle_sweep), results in its sft.json and dpo.json.
# NEEDLE_SWEEP_OPTIONS holds overrides of `ablation`, such as "ablation.seeds=[0] ablation.jobs_per_gpu=4";
# runs that share a device lose nothing by it, since all take the same steps.
# Run it again after an interruption: what is done is kept.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ -z ${IC_PYTHON:-} ]]; then
  make .venv/.run
  IC_PYTHON=.venv/bin/python
fi
folder=${NEEDLE_SWEEP_DIR:-runs/needle_sweep}
read -ra options <<<"${NEEDLE_SWEEP_OPTIONS:-}"

case ${NEEDLE_SWEEP_SCALE:-gpu} in
  gpu)
    start=(experiment=mla_small)
    model=(model=mla_small)
    data=(data.context_length=16384 data.tokens_per_batch=32768)
    evaluation=('evaluation.samples_by_length={131072:5}')
    all=512,1024,4096,16384 short=512,1024 long=16384 many=32 many_lengths=1536,4096,16384
    tokens=3600000 val=2048,8192 sft_steps=400 dpo_steps=100 sft_lr=5e-4 dpo_lr=2e-5
    ;;
  cpu)
    model=(model=mla_tiny model.hidden_size=256 model.intermediate_size=680 model.num_hidden_layers=4
      model.kv_lora_rank=128 model.qk_nope_head_dim=64 model.qk_rope_head_dim=32 model.v_head_dim=64)
    start=(experiment=mla_tiny "${model[@]}" optimizer.lr=3e-3 optimizer.weight_decay=0.1 optimizer.decay_fraction=0.25
      data.context_length=512 callbacks.context_length.threshold=0.95 trainer.max_steps=700)
    data=(data.context_length=1024 data.tokens_per_batch=4096 trainer.accelerator=cpu trainer.precision=32-true
      data.num_workers=0)
    evaluation=('evaluation.lengths=[512,1024,2048]' 'evaluation.depths=[0,0.5,1]' evaluation.samples=10
      evaluation.samples_by_length={})
    all=512,1024 short=512 long=1024 many=16 many_lengths=768,1024
    tokens=600000 val=512,1024 sft_steps=120 dpo_steps=25 sft_lr=3e-4 dpo_lr=3e-5
    ;;
  *)
    echo "NEEDLE_SWEEP_SCALE=$NEEDLE_SWEEP_SCALE: choose gpu or cpu" >&2
    exit 2
    ;;
esac

# pairs NAME LENGTHS [overrides]: needle conversations of as many tokens of each length.
pairs() {
  local file=$folder/$1.jsonl commas=${2//[^,]/}
  [[ -f $file ]] || "$IC_PYTHON" -m ic make-preferences "output=$file" "lengths=[$2]" \
    "tokens_per_length=$((tokens / (${#commas} + 1)))" "${@:3}"
}
mkdir -p "$folder"
pairs base $all
pairs no-distractors $all num_distractors=0
pairs $many-distractors $many_lengths num_distractors=$many
pairs short $short
pairs long $long
pairs middle $all 'depths=[0.4,0.5,0.6]'
pairs random-words $all filler=random
pairs distractor $all 'rejected={distractor:1}'
pairs near-miss $all 'rejected={near_miss:1}'
pairs refusal $all 'rejected={refusal:1}'
pairs val $val split=validation tokens_per_length=null samples=2

# common EXPERIMENT START STEPS LR: a line an override.
common() {
  printf '%s\n' "experiment=$1" "${model[@]}" "model.init_from=$2" model.gradient_checkpointing=false "${data[@]}" \
    "data.train_files=[$folder/base.jsonl]" "data.val_files=[$folder/val.jsonl]" "trainer.max_steps=$3" \
    "optimizer.lr=$4" logger=none
}
# Overrides of the sweep alone: all of the time goes to training, weights are not kept.
quiet=(trainer.limit_val_batches=0 trainer.num_sanity_val_steps=0 callbacks.checkpoint=null
  callbacks.memory=null "${evaluation[@]}" evaluation.share_haystack=true evaluation.control_samples=0)

# A variant for each file.
variants() {
  local list=()
  for name in "$@"; do
    list+=("{name: $name, overrides: [\"data.train_files=[$folder/$name.jsonl]\"]}")
  done
  (IFS=,; echo "[${list[*]}]")
}

# sweep NAME COMMON... -- FILES...
sweep() {
  local name=$1 overrides=()
  shift
  while [[ $1 != -- ]]; do
    overrides+=("\"$1\"")
    shift
  done
  shift
  "$IC_PYTHON" -m ic ablation ablation.max_time_s=null "ablation.output=$folder/$name.json" \
    "ablation.output_dir=$folder/runs" \
    "ablation.common=[$(IFS=,; echo "${overrides[*]}")]" "ablation.variants=$(variants "$@")" "${options[@]}"
}

base=$folder/${start[0]#*=}/base
[[ -f $base/results.json ]] || "$IC_PYTHON" -m ic fit "${start[@]}" "output_dir=$folder" run_id=base \
  overwrite=true callbacks.passkey.at_end=false "$@"

mapfile -t shared < <(common sft_32k "$base/checkpoints/last" $sft_steps $sft_lr)
sweep sft "${shared[@]}" "${quiet[@]}" "$@" -- base no-distractors $many-distractors short long middle random-words

sft=$folder/sft_32k/sft
[[ -f $sft/results.json ]] || "$IC_PYTHON" -m ic fit "${shared[@]}" "output_dir=$folder" run_id=sft \
  overwrite=true callbacks.passkey.at_end=false "$@"

mapfile -t shared < <(common dpo_32k "$sft/checkpoints/last" $dpo_steps $dpo_lr)
sweep dpo "${shared[@]}" "${quiet[@]}" "$@" -- base distractor near-miss refusal
