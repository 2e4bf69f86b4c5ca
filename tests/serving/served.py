"""A small model, served by a thread of the test's process or by a process of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx2
import openai
import torch
from transformers import GenerationConfig

from ic.checkpoint.folder import FolderCheckpointIO
from ic.inference.engine.options import EngineOptions
from ic.model import MLAConfig, MLAForCausalLM
from ic.model.byte_tokenizer import ByteTokenizer
from ic.serving.options import LimitOptions, ServeOptions
from ic.serving.server import Server, ready
from tests.conftest import SMALL, randomize

NAME = "tiny"
PAGE_TOKENS = 16
# How often the metrics are read before a test gives up: each time takes milliseconds.
_MOST_TRIES = 20_000


def save_model(folder: Path) -> Path:
    """A checkpoint of random weights, which answers in random bytes."""
    torch.manual_seed(0)
    special = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
    sizes = {**SMALL, **special, "vocab_size": 320, "num_hidden_layers": 1}
    model = MLAForCausalLM(MLAConfig(**sizes)).eval()
    randomize(model)
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    io = FolderCheckpointIO(model.config, ByteTokenizer())
    io.save_checkpoint({"state_dict": state, "context_length": 2048}, folder)
    return folder


@dataclass
class Served:
    """A server that answers."""

    url: str
    token: str | None
    server: Server | None = None

    @cached_property
    def http(self) -> httpx2.Client:
        """Made once: what it knows of certificates takes longer than an answer."""
        headers = {"authorization": f"Bearer {self.token}"} if self.token else {}
        return httpx2.Client(base_url=self.url, headers=headers, timeout=300)

    def client(self, **options: Any) -> openai.OpenAI:
        """OpenAI's own client, which here asks nothing twice."""
        given = {"max_retries": 0, "timeout": 300.0, **options}
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.token or "none", **given)

    def post(self, route: str, body: Any) -> httpx2.Response:
        return self.http.post(route, json=body)

    def complete(self, **body: Any) -> httpx2.Response:
        return self.post("/v1/completions", {"prompt": "The key", "temperature": 0, **body})

    def metrics(self) -> dict[str, float]:
        """Each sample by its name and labels, without those of the model and the engine."""
        text = self.http.get("/metrics").text
        text = re.sub(rf'engine="0",|,?model_name="{NAME}"(?=[,}}])', "", text)
        text = text.replace("{,", "{").replace("{}", "")
        lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in lines}

    def wait_for(self, name: str, value: float) -> dict[str, float]:
        """The metrics, once one of them has a value."""
        for _ in range(_MOST_TRIES):
            if (found := self.metrics()).get(name, 0.0) == value:
                return found
        raise AssertionError(f"{name} is not {value}, but {found.get(name)}")

    def wait_until_idle(self) -> dict[str, float]:
        """The metrics once the engine works on nothing, and no request holds a page."""
        self.wait_for("ic:num_requests_running", 0)
        self.wait_for("ic:num_requests_waiting", 0)
        return self.wait_for("ic:cache_pages_used", 0)


@contextmanager
def served(
    folder: Path, token: str | None = None, limits: LimitOptions | None = None, **engine: Any
) -> Iterator[Served]:
    """Serve by a thread of this process."""
    sizes = {"cache_tokens": 8192, "page_tokens": PAGE_TOKENS, **engine}
    config = ServeOptions(
        source=str(folder),
        backend="engine",
        port=0,
        model_name=NAME,
        accelerator="cpu",
        engine=EngineOptions(**sizes),
        limits=limits or LimitOptions(),
    )
    with ready(config, token) as server:
        thread = threading.Thread(target=server.serve_clients)
        thread.start()
        try:
            yield Served(f"http://127.0.0.1:{server.port}", token, server)
        finally:
            server.handle_exit(signal.SIGTERM, None)
            thread.join()


@contextmanager
def process(
    folder: Path, *options: str, port: int = 0, env: dict[str, str] | None = None
) -> Iterator[tuple[subprocess.Popen[str], Served]]:
    """Serve by a process, as a user would start it."""
    command = [
        *(sys.executable, "-m", "ic", "serve", f"source={folder}", "backend=engine"),
        *("accelerator=cpu", f"port={port}", f"model_name={NAME}", "engine.cache_tokens=8192"),
        *(f"engine.page_tokens={PAGE_TOKENS}", *options),
    ]
    found = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
    )
    try:
        assert found.stdout is not None
        address = re.search(r"http://[\d.]+:\d+", found.stdout.readline())
        assert address, "it has not begun to serve"
        yield found, Served(address[0], (env or {}).get("IC_SERVE_TOKEN"))
    finally:
        found.kill()
        found.communicate()


def greedy(folder: Path, prompt_ids: Sequence[int], new_tokens: int) -> list[int]:
    """What transformers' generate answers, without the prompt: the independent side."""
    model: Any = MLAForCausalLM.from_pretrained(folder)
    config = GenerationConfig(max_new_tokens=new_tokens, eos_token_id=257, pad_token_id=258)
    ids = torch.tensor([list(prompt_ids)])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return out[0, ids.shape[1] :].tolist()
