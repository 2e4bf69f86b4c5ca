"""Two hundred clients at once of vLLM's own server, begun by our command and killed amid them."""

from __future__ import annotations

import asyncio
import os
import select
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import psutil
import pytest
import torch

from ic.model.byte_tokenizer import ByteTokenizer
from ic.serving.vllm_command import MODULE
from tests.ansible.machines import free_ports
from tests.serving.crowd import BROKEN, NEW_TOKENS, PROMPTS, Crowd
from tests.serving.served import NAME, Served, greedy
from tests.vllm.conftest import environment, saved_model, wait_until_ready

pytestmark = pytest.mark.vllm
TOKEN = "a-token-of-sixteen-or-more"
CLIENTS = 200
MAX_TOKENS = 2048
# What vLLM counts of requests in work; the cache's pages that are kept for later prompts are free.
IDLE = (*("vllm:num_requests_running", "vllm:num_requests_waiting"), "vllm:kv_cache_usage_perc")
# How long a process whose server was killed may take to end; seconds were seen.
PATIENCE_S = 300
ANSWERED = Counter(
    {
        ("whole", "right"): 20,
        ("stream", "right"): 20,
        ("several", "right"): 20,
        ("read_slowly", "right"): 20,
        ("leave", "left"): 20,
        ("leave_unanswered", "left"): 20,
        ("too_large", "400 400"): 20,  # longer than the context: vLLM takes bodies of any size
        ("malformed", "400 400"): 20,
        ("unauthorised", "401 invalid_api_key"): 20,
        ("out_of_range", "400 400"): 20,
    }
)


class VllmCrowd(Crowd):
    """Clients of vLLM's server."""

    def error(self, response: httpx2.Response) -> str:
        """vLLM's own codes are statuses."""
        code = response.json()["error"]["code"]
        assert code == ("invalid_api_key" if response.status_code == 401 else response.status_code)
        return super().error(response)


def save_model(folder: Path) -> list[str]:
    """A model that answers in ASCII, and its greedy answers.

    vLLM leaves out what would be an incomplete character at an answer's end, ours writes U+FFFD.
    """
    tokenizer = ByteTokenizer()
    special = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
    model = saved_model(folder, **special, vocab_size=320, num_hidden_layers=1)
    spelled = torch.zeros(320, dtype=torch.bool)
    spelled[32:127] = True
    with torch.no_grad():
        model.lm_head.weight[~spelled] = 0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    answers = [greedy(folder, tokenizer(prompt)["input_ids"], NEW_TOKENS) for prompt in PROMPTS]
    return [str(tokenizer.decode(answer)) for answer in answers]


@contextmanager
def server_of(folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], Served, list[int]]]:
    """Our command, once it serves; and what shows that its processes have ended."""
    (port,) = free_ports(1)
    arguments = f"vllm_arguments=[--max-model-len,{MAX_TOKENS},--enforce-eager]"
    command = [sys.executable, "-m", "ic", "serve", f"source={folder}", "backend=vllm"]
    command += [f"port={port}", f"model_name={NAME}", "dtype=float32", arguments]
    path = folder.with_suffix(".log")
    with path.open("wb") as log:
        server = subprocess.Popen(
            command, env=environment(IC_SERVE_TOKEN=TOKEN), stdout=log, stderr=subprocess.STDOUT
        )
    processes: list[psutil.Process] = []
    watches: list[int] = []
    try:
        wait_until_ready(server, port, path)
        processes = psutil.Process(server.pid).children(recursive=True)
        watches = [os.pidfd_open(process.pid) for process in processes]
        yield server, Served(f"http://127.0.0.1:{port}", TOKEN), watches
    finally:
        server.kill()
        server.wait()
        for process in processes:
            if process.is_running():
                process.kill()
        for watch in watches:
            os.close(watch)


def test_all_are_answered_and_none_waits_for_a_server_that_was_killed(tmp_path: Path) -> None:
    expected = save_model(tmp_path / "model")
    assert len(set(expected)) > 1
    assert all(len(answer) == NEW_TOKENS for answer in expected)
    with server_of(tmp_path / "model") as (server, found, watches):
        assert MODULE in psutil.Process(server.pid).cmdline()  # our command became vLLM's
        assert len(watches) >= 2  # the engine, and its worker
        # Of vLLM's copies none may be greedy.
        calm = VllmCrowd(found.url, TOKEN, expected, 2 * MAX_TOKENS, copies=1)
        asyncio.run(calm.run(CLIENTS))
        assert calm.outcomes == ANSWERED
        for gauge in IDLE:
            metrics = found.wait_for(gauge, 0)
        assert [metrics[gauge] for gauge in IDLE] == [0, 0, 0]
        broken = VllmCrowd(found.url, TOKEN, expected, 2 * MAX_TOKENS, copies=1)
        asyncio.run(broken.run_and_kill(CLIENTS, server.kill))
        for watch in watches:
            assert select.select([watch], [], [], PATIENCE_S)[0], "a process stays alive"
    assert broken.outcomes.total() == CLIENTS
    # Each as in the calm, but for those whose connection the kill broke.
    ends = Counter(
        BROKEN if end == BROKEN else (kind, end) for kind, end in broken.outcomes.elements()
    )
    assert ends.pop(BROKEN) > 0
    assert ends.keys() <= ANSWERED.keys()
