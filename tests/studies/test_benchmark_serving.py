"""`benchmark serving`: what is computed from times, a whole run on a tiny model, and a server."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure

from ic.inference.engine.engine import Engine
from ic.model import MLAConfig, MLAForCausalLM
from ic.model.byte_tokenizer import ByteTokenizer
from ic.model.cost import num_parameters
from ic.studies.serving.bounds import Bounds, cache_bytes, weight_bytes
from ic.studies.serving.options import ServingBenchmarkOptions
from ic.studies.serving.prompts import Prompts
from ic.studies.serving.timing import RequestTimes, decode_rate, summarise

Run = Callable[..., int]
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def folder(make_model: Callable[..., MLAForCausalLM], tmp_path: Path) -> Path:
    path = tmp_path / "tiny"
    make_model(vocab_size=320, num_hidden_layers=1, max_position_embeddings=256).save_pretrained(
        path
    )
    ByteTokenizer().save_pretrained(path)
    return path


def test_what_follows_from_the_times() -> None:
    """Two requests, by hand: the second waits for the first one's prompt."""
    first = RequestTimes(100, 10.0, 0, [(10.5, 1), (10.6, 1), (10.8, 1), (11.0, 1), (11.2, 1)])
    second = RequestTimes(100, 10.0, 60, [(10.75, 1), (10.9, 1), (11.1, 1), (11.15, 1)])
    # From 10.75 to 11.15: 10.8, 11.0 of the first, 10.9, 11.1, 11.15 of the second.
    assert decode_rate([first, second]) == pytest.approx(5 / 0.4)
    row = summarise([[first, second]])
    assert row["n"] == 1
    assert row["num_requests"] == 2
    assert row["time_to_first_token_p50_s"] == pytest.approx((0.5 + 0.75) / 2)
    assert row["time_to_first_token_p95_s"] == pytest.approx(0.5 + 0.95 * 0.25)
    assert row["time_per_output_token_p50_s"] == pytest.approx((0.7 / 4 + 0.4 / 3) / 2, rel=1e-4)
    assert row["inter_token_p50_s"] == pytest.approx(0.2)  # of .05 .1 .15 .2 .2 .2 .2
    assert row["decode_tokens_per_s"] == 12.5
    assert row["output_tokens_per_s"] == pytest.approx(9 / 1.2, rel=1e-3)
    assert row["prefill_tokens_per_s"] == pytest.approx(140 / 0.75, rel=1e-3)
    assert row["prefix_hit_rate"] == 0.3
    # One has ended before the other begins.
    late = RequestTimes(100, 10.0, 0, [(12.0, 1), (12.1, 1)])
    assert decode_rate([first, late]) is None
    assert summarise([[first, late]])["decode_tokens_per_s"] is None


def test_bounds() -> None:
    """The bytes of a step, and the figures of the 1B at the bandwidth of a copy on an H100."""
    config = MLAConfig(
        vocab_size=320,
        hidden_size=2048,
        intermediate_size=5440,
        num_hidden_layers=16,
        num_attention_heads=16,
        kv_lora_rank=192,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model = MLAForCausalLM(config).to(torch.bfloat16)
    embedding = 320 * 2048
    assert 0 <= weight_bytes(model) - 2 * (num_parameters(config) - embedding) < 10_000
    assert cache_bytes(model) == 16 * (192 + 64) * 2
    for kind in ("fp8", "int8"):
        config.set_cache_dtype(kind)
        assert cache_bytes(model) == 16 * (192 + 64 + 4)
    config.cache_dtype = "auto"
    bounds = Bounds(model, weight_bytes(model), cache_bytes(model), 2.98e12, 989.4e12)
    assert bounds.decode_tokens_per_s(1, 4096) == pytest.approx(2022, rel=0.01)
    assert bounds.decode_tokens_per_s(1, 131072) == pytest.approx(1189, rel=0.01)
    step_s = 64 / bounds.decode_tokens_per_s(64, 4096)
    every = weight_bytes(model) + 64 * 4096 * cache_bytes(model)
    assert step_s * 2.98e12 == pytest.approx(every)
    assert bounds.prefill_mfu(4096, 2 * 1000.0) == 2 * (bounds.prefill_mfu(4096, 1000.0) or 0)


def test_prompts_differ_but_for_what_they_share() -> None:
    options = ServingBenchmarkOptions(
        checkpoint="x", contexts=[64, 128], output_tokens=8, shared_tokens=20
    )
    prompts = Prompts(options, 256, None)
    every = [
        (batch, row)
        for batch, context, repeat in ((2, 64, -1), (2, 64, 0), (3, 64, 0))
        for row in prompts.draw(batch, context, repeat)
    ]
    assert {len(row) for _, row in every} == {56}
    assert len({tuple(row[20:]) for _, row in every}) == 7
    assert len({tuple(row[:20]) for _, row in every}) == 2  # of a cell they are the same
    assert prompts.draw(2, 64, 0) == Prompts(options, 256, None).draw(2, 64, 0)
    text = list(range(130))
    (row,) = Prompts(options, 256, text).draw(1, 128, 0)
    assert row[:20] == list(range(row[0], row[0] + 20))
    assert row[20:] == list(range(row[20], row[20] + 100))
    with pytest.raises(ValueError, match="has 119 tokens, and the longest prompt is to have 120"):
        Prompts(options, 256, text[:119])


def test_a_run_on_the_engine(
    ic: Run,
    folder: Path,
    capsys: Capture,
    tmp_path: Path,
    figures: list[Figure],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Cells that are measured stay; one that does not fit says why, and stops no other."""
    args = (
        *("benchmark", "serving", f"checkpoint={folder}", "accelerator=cpu", "output_tokens=16"),
        *("shared_tokens=64", "engine.page_tokens=16", "repeats=2", "output=out/serving.json"),
    )
    assert ic(*args, "batches=[2]", "contexts=[128,512]") == 0
    shown = capsys.readouterr().out
    assert "maximum context length is 256 tokens" in shown
    found = json.loads((tmp_path / "out/serving.json").read_text())
    row, failed = found["rows"]
    assert (row["batch"], row["context_tokens"], row["n"], row["num_requests"]) == (2, 128, 2, 4)
    assert row["prefix_hit_rate"] == round(64 / 112, 4)  # four whole pages of each prompt
    assert row["decode_tokens_per_s"] > 0
    assert failed["error"].startswith("This model's maximum context length is 256 tokens")
    assert found["config"]["output_tokens"] == 16
    assert {"commit", "device", "versions", "command"} <= set(found)
    assert (tmp_path / "out/serving.png").stat().st_size > 0
    asked: list[int] = []
    generate = Engine.generate
    monkeypatch.setattr(
        Engine, "generate", lambda self, x: asked.append(len(x)) or generate(self, x)
    )
    assert ic(*args, "batches=[1,2]", "contexts=[128]") == 0
    again = json.loads((tmp_path / "out/serving.json").read_text())["rows"]
    assert again[1] == row
    assert [x["batch"] for x in again] == [1, 2]
    assert asked == [1, 1, 1], "a cell was measured again"
    speed, wait = figures[-1].axes
    assert [line.get_label() for line in wait.lines] == ["1 request", "2 requests"]
    assert list(speed.lines[0].get_ydata()) == [again[0]["decode_tokens_per_s"]]
    assert ic(*args, "batches=[1]", "contexts=[128]", "seed=1") == 2
    assert "was measured with seed=0, and this is seed=1" in capsys.readouterr().err


def test_no_cell_fits(ic: Run, folder: Path, capsys: Capture, tmp_path: Path) -> None:
    """It is an error, before the weights are loaded where the configuration tells."""
    args = ("benchmark", "serving", f"checkpoint={folder}", "accelerator=cpu", "output_tokens=16")
    args += ("batches=[1]", "output=none.json")
    assert ic(*args, "contexts=[128]", "engine.cache_tokens=64") == 2
    assert "no cell fits, and none was measured: 1 request at 128: The cache of this engine" in (
        capsys.readouterr().err
    )
    assert json.loads((tmp_path / "none.json").read_text())["rows"][0]["error"]
    (folder / "model.safetensors").unlink()
    assert ic(*args, "contexts=[512,300]") == 2
    assert "contexts=[512, 300]: the model has 256 positions" in capsys.readouterr().err


def test_the_loop_of_transformers(ic: Run, folder: Path, tmp_path: Path) -> None:
    args = ("batches=[2]", "contexts=[40]", "output_tokens=8", "repeats=1", "loop=generate")
    out = f"output={tmp_path}/out.json"
    assert ic("benchmark", "serving", f"checkpoint={folder}", "accelerator=cpu", *args, out) == 0
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    # Its rows end together, so that every token but the first counts.
    assert row["decode_tokens_per_s"] == pytest.approx(
        2 / row["time_per_output_token_p50_s"], rel=1e-2
    )


class Server(BaseHTTPRequestHandler):
    """Streams `max_tokens` letters, two in a piece; refuses prompts of more than 100 tokens, and
    with 429 as many requests as `busy` has entries.
    """

    asked: list[dict[str, Any]]
    busy: list[str]

    def do_GET(self) -> None:
        if self.headers["Authorization"] != "Bearer secret":
            return self._say(401, {"error": {"message": "no"}})
        self._say(200, {"data": [{"id": "tiny"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        with suppress(IndexError):
            return self._say(429, {"error": {"message": self.busy.pop()}})
        if len(body["prompt"]) > 100:
            return self._say(400, {"error": {"message": "too long"}})
        self.send_response(200)
        self.end_headers()
        for _ in range(body["max_tokens"] // 2):
            self._chunk({"choices": [{"text": "ab"}]})
        counts = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}
        usage = {**counts, "prompt_tokens_details": {"cached_tokens": 16}}
        self._chunk({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def _chunk(self, value: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(value).encode() + b"\n\n")

    def _say(self, status: int, value: dict[str, Any]) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    Server.asked, Server.busy = [], []
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()


def test_a_server(
    ic: Run, url: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    args = ("benchmark", "serving", "output_tokens=16", "repeats=2", "output=out.json")
    args += ("batches=[3]", "contexts=[64,256]")
    assert ic(*args, f"url={url}") == 2
    assert "refuses the token (401); put it into the variable IC_SERVE_TOKEN" in (
        capsys.readouterr().err
    )
    monkeypatch.setenv("IC_SERVE_TOKEN", "secret")
    assert ic(*args, f"url={url}", "server_model=tony") == 2
    assert "unknown model 'tony'; did you mean tiny?" in capsys.readouterr().err
    assert ic(*args, f"url={url}") == 0
    row, failed = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert failed["error"].endswith('answers 400: {"error": {"message": "too long"}}')
    assert (row["n"], row["num_requests"]) == (2, 6)
    assert row["prefix_hit_rate"] == round(16 / 48, 4)
    (body, *_) = Server.asked
    assert (len(body["prompt"]), body["max_tokens"], body["model"]) == (48, 16, "tiny")
    assert body["ignore_eos"] is body["stream"] is True
    assert all(0 <= token < 256 for token in body["prompt"])
    assert ic(*args, f"url={url}", "contexts=[200]", "output=long.json") == 2
    assert "no cell fits" in capsys.readouterr().err
    Server.busy = ["too many"]
    assert ic(*args, f"url={url}", "contexts=[64]", "batches=[3,1]", "output=busy.json") == 1
    assert "1 of 2 cells failed (3 requests at 64): see error in busy.json" in (
        capsys.readouterr().err
    )
    row, failed = json.loads((tmp_path / "busy.json").read_text())["rows"]
    assert (row["batch"], row["n"], failed["batch"]) == (1, 2, 3)
    assert failed["error"].endswith('answers 429: {"error": {"message": "too many"}}')
    assert ic(*args, f"url={url}", "contexts=[64]", "batches=[3,1]", "output=busy.json") == 0
    assert ic(*args, "url=http://127.0.0.1:9/v1", "output=other.json") == 2
    assert "no server answers there" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint": None}, "and neither is given"),
        ({"url": "http://x"}, "and both are given"),
        ({"server_model": "m"}, "goes with url= alone"),
        ({"batches": [128]}, "engine.max_batch=64"),
        ({"batches": []}, r"batches=\[\]"),
        ({"batches": [1, 1]}, "give each one once"),
        ({"contexts": [256]}, "leaves 0 tokens to the prompt"),
        ({"contexts": [300], "shared_tokens": 50}, r"it needs 50 \(shared_tokens\)"),
        ({"output_tokens": 1}, "output_tokens=1: must be at least 2"),
        ({"loop": "enigne"}, "did you mean engine"),
        ({"output": "x.txt"}, "must end in .json"),
        ({"checkpoint": None, "url": "localhost"}, "must begin with http"),
        ({"checkpoint": None, "url": "http://x", "dtype": "float16"}, "dtype: is of a model that"),
        ({"checkpoint": None, "url": "http://x", "prompt_file": "f"}, "tokenizer=FOLDER"),
    ],
)
def test_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ServingBenchmarkOptions(**{"checkpoint": "x", **changes})
