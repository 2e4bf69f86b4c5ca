"""vLLM in processes of its own: its HTTP server, and vLLM without our plugin."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch

from ic.checkpoint.export import export_checkpoint
from ic.checkpoint.source import find_source
from ic.model import MLAForCausalLM
from ic.model.byte_tokenizer import ByteTokenizer
from tests.vllm.conftest import environment, prompts, saved_model, wait_until_ready

pytestmark = pytest.mark.vllm
VOCABULARY = 320
ANSWER = """
import json, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    llm = LLM(dtype="float32", max_model_len=512, block_size=16, max_logprobs=-1,
              enforce_eager=True, skip_tokenizer_init=True, **asked["options"])
    sampling = SamplingParams(max_tokens=4, temperature=0, logprobs=-1, ignore_eos=True,
                              detokenize=False)
    given = [{"prompt_token_ids": prompt} for prompt in asked["prompts"]]
    for prompts in (given, given):
        outputs = [o.outputs[0] for o in llm.generate(prompts, sampling, use_tqdm=False)]
    rows = [[[row[i].logprob for i in range(asked["vocabulary"])] for row in o.logprobs]
            for o in outputs]
    print("ANSWER", json.dumps([[list(o.token_ids) for o in outputs], rows]), flush=True)
"""


def worst_of_a_process(
    model: MLAForCausalLM, folder: Path, options: dict[str, Any], **more: str
) -> float:
    """Largest difference of a log-probability from the model's, in a vLLM of its own."""
    script = folder.parent / "answer.py"  # a file, because its processes import it
    script.write_text(ANSWER)
    asked = {
        "options": {"model": str(folder), **options},
        "prompts": prompts(3, 40, 150),
        "vocabulary": model.config.vocab_size,
    }
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(asked)],
        env=environment(**more),
        capture_output=True,
        text=True,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWER")]
    assert lines, done.stdout[-2000:] + done.stderr[-4000:]
    worst = 0.0
    for prompt, ids, rows in zip(asked["prompts"], *json.loads(lines[0][7:]), strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
        worst = max(worst, float((torch.tensor(rows) - logits.log_softmax(-1)).abs().max()))
    return worst


def test_stock_vllm_loads_a_plain_export(tmp_path: Path) -> None:
    """Without our plugin. A plain rotation is wrong in vLLM's kernel for CPUs, YaRN's is not."""
    yarn = {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 8.0,
        "original_max_position_embeddings": 512,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    }
    plain = {"kv_lora_rank": 512, "length_temperature": "none", "rope_parameters": yarn}
    model = saved_model(tmp_path / "model", **plain, vocab_size=VOCABULARY, q_lora_rank=32)
    exported = tmp_path / "exported"
    export_checkpoint(find_source(str(tmp_path / "model")), exported, tokenizer=ByteTokenizer())
    assert json.loads((exported / "config.json").read_text())["model_type"] == "deepseek_v3"
    assert worst_of_a_process(model, exported, {}, VLLM_PLUGINS="none") < 1e-4


def test_two_ranks_share_the_heads(tmp_path: Path) -> None:
    model = saved_model(tmp_path / "model", num_attention_heads=4)
    options = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    # One core each: vLLM itself gives every rank a NUMA node, and there may be one.
    cores = "|".join(map(str, sorted(os.sched_getaffinity(0))[:2]))
    bound = {"VLLM_CPU_OMP_THREADS_BIND": cores}
    assert worst_of_a_process(model, tmp_path / "model", options, **bound) < 1e-4


def test_the_http_server_streams_an_answer(tmp_path: Path) -> None:
    tokenizer = ByteTokenizer()
    model = saved_model(tmp_path / "model", vocab_size=VOCABULARY)
    tokenizer.save_pretrained(tmp_path / "model")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = (tmp_path / "log").open("w+")
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]
    command += [str(tmp_path / "model"), "--served-model-name=ours", "--host=127.0.0.1"]
    command += [f"--port={port}", "--dtype=float32", "--max-model-len=512", "--enforce-eager"]
    server = subprocess.Popen(command, env=environment(), stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_until_ready(server, port, tmp_path / "log")
        asked = {"model": "ours", "prompt": "The pass key is", "max_tokens": 16, "temperature": 0}
        asked |= {"stream": True, "ignore_eos": True, "add_special_tokens": False}
        asked |= {"return_token_ids": True}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions",
            json.dumps(asked).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            lines = [line.decode().strip() for line in answer]
    finally:
        server.terminate()
        server.wait()
        log.close()
    events = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event)["choices"][0] for event in events[:-1]]
    assert len(chunks) > 4  # it came piece by piece
    assert chunks[-1]["finish_reason"] == "length"
    streamed = [i for chunk in chunks for i in chunk.get("token_ids") or []]
    ids = tokenizer("The pass key is", add_special_tokens=False, return_tensors="pt").input_ids
    with torch.no_grad():
        out = model.generate(ids, max_new_tokens=16, do_sample=False, eos_token_id=None)
    assert streamed == out[0, ids.shape[1] :].tolist()
