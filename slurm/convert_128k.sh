#!/usr/bin/env bash
# From a public model with grouped queries to one with MLA that reads 128k tokens and converses, and
# what that cost, measured (docs/conversion.md#all-of-it-in-one-command):
#   bash slurm/convert_128k.sh ORIGINAL TEXT LONG HELD_OUT
# ORIGINAL is a folder or GGUF file; TEXT is a file of what it is healed on, of all kinds that it
# shall read; LONG one of documents of 100,000 tokens and more; HELD_OUT is in neither of them.
# Relative paths, those of OUT and of overrides too, count from the checkout's root.
# Each stage takes overrides from a variable: CONVERT, CHATS, HEAL, LONG_8K, LONG_96K, SFT, PARITY,
# EVALUATE. CHATS are conversations that ORIGINAL writes by itself, before anything is trained;
# without a chat template it cannot, and both CHATS and SFT are left out.
# Run it again after an interruption: what is done is kept, the rest continues.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if (($# != 4)); then
  echo "convert_128k.sh: want ORIGINAL TEXT LONG HELD_OUT, got $# arguments" >&2
  exit 2
fi
for file in "$@"; do
  if [[ ! -e $file ]]; then
    echo "convert_128k.sh: there is no $file" >&2
    exit 2
  fi
done
original=$1 text=$2 long=$3 held_out=$4
out=${OUT:-runs/convert_128k}
if [[ -z ${IC_PYTHON:-} ]]; then
  make .venv/.run
  IC_PYTHON=.venv/bin/python
fi
gpus=${GPUS:-$("$IC_PYTHON" -c "import torch; print(torch.cuda.device_count())")}

# ic VARIABLE WORD...: the command with a variable's overrides. In the check no run is there yet.
ic() {
  local -n words=$1
  local given command
  read -ra given <<<"${words:-}"
  command=("$IC_PYTHON" -m ic "${@:2}" ${given[@]+"${given[@]}"})
  if [[ -z ${checking:-} ]]; then
    "${command[@]}"
    return
  fi
  if [[ $2 == fit ]]; then
    command+=("model.init_from=$out/converted")
  fi
  "${command[@]}" --print_config >/dev/null
}
# train NAME VARIABLE WORD...: `fit`, unless it has ended.
train() {
  if [[ -n ${checking:-} || ! -f $out/$1/0/results.json ]]; then
    ic "$2" fit "name=$1" "output_dir=$out" run_id=0 ckpt_path=auto trainer=gpu strategy=ddp \
      "trainer.devices=$gpus" model.attention=triton model.norm=triton model.rope=triton \
      "data.val_files=[$held_out]" "${@:3}"
  fi
}
# Rows of 96k fit 80 GB without gradient checkpointing.
extend() {
  train "$1" "$2" experiment=long_128k "data.train_files=[$long]" \
    model.gradient_checkpointing=false data.max_position=163840 "${@:3}"
}
compare() {
  ic PARITY parity "original=$original" "converted=$out/$1/0" "output=$out/$1/parity" \
    "text=[$held_out]" 'lengths=[2048,8192]' documents=12 'parts=[logits,cache,instructions]'
}
stages() {
  # They need the original alone; what refuses them is known before the long training.
  if [[ $last == sft && (-n ${checking:-} || ! -f $out/chats.jsonl) ]]; then
    ic CHATS make_chats "checkpoint=$original" "output=$out/chats.jsonl" count=4000 batch_size=256
  fi
  train heal HEAL experiment=heal "model.init_from=$out/converted" \
    "distillation.teacher=$original" "data.train_files=[$text]" data.val_fraction=0 \
    data.tokens_per_batch=49152 model.compile=true distillation.compile=true optimizer.lr=8e-4 \
    optimizer.warmup_steps=40
  compare heal
  extend long_8k LONG_8K "model.init_from=$out/heal/0" data.context_length=32768 \
    data.tokens_per_batch=32768 'callbacks.context_length.stages=[[0,8192],[900,32768]]' \
    trainer.max_steps=1330 model.compile=true
  extend long_96k LONG_96K "model.init_from=$out/long_8k/0" data.context_length=98304 \
    data.tokens_per_batch=98304 data.least_document_tokens=65536 \
    'callbacks.context_length.stages=[[0,98304]]' optimizer.lr=3e-4 optimizer.warmup_steps=5 \
    trainer.max_steps=47
  if [[ $last == sft ]]; then
    # Its rows skip further than the converted model, with which it is checked, has positions.
    train sft SFT experiment=sft_converted "model.init_from=$out/long_96k/0" \
      "data.train_files=[$out/chats.jsonl]" "data.needle_files=[$long]" 'data.val_files=[]' \
      ${checking:+model.max_position_embeddings=1048576}
  fi
  compare "$last"
  ic EVALUATE evaluate "checkpoint=$out/$last/0" "output=$out/$last/suites" \
    "devices=$gpus" attention=triton norm=triton rope=triton 'suite=[niah,ruler,perplexity]' \
    "suite.niah.haystack=$held_out" 'suite.niah.lengths=[4096,8192,16384,32768,65536,131072]' \
    suite.niah.samples=60 "suite.ruler.haystack=$held_out" suite.ruler.samples=10 \
    'suite.ruler.lengths=[4096,8192,16384,32768,65536]' "suite.perplexity.files=[$held_out]" \
    'suite.perplexity.lengths=[131072]' suite.perplexity.samples=12
}

if [[ ! -f $out/converted/config.json ]]; then
  ic CONVERT convert "source=$original" "output=$out/converted" rank=128 "calibration=[$text]" \
    parity=null
fi
last=sft
if [[ ! -f $out/converted/chat_template.jinja ]]; then
  echo "convert_128k.sh: $original has no chat template: no chats are made, and none trained on"
  last=long_96k
fi
checking=1 stages # a wrong override is one line here, and not hours later
stages
echo "what it cost: $out/*/parity/report.md; what it finds: $out/$last/suites/report.md"
