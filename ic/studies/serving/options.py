"""What `benchmark serving` measures. Imports no PyTorch."""

from __future__ import annotations

from dataclasses import dataclass, field

from ic.errors import check_choice, check_once
from ic.inference.engine.options import EngineOptions
from ic.inference.options import LoadOptions

LOOPS = ("engine", "generate")
# Any model has so many tokens, and a server does not say how many it has.
_SERVER_VOCABULARY = 256


@dataclass
class _Source:
    """Who answers; a class of its own because help shows the fields of the last base first."""

    checkpoint: str | None = None
    url: str | None = None


@dataclass
class ServingBenchmarkOptions(LoadOptions, _Source):
    """Latency and throughput by batch and context.

    Each cell is a number of requests that arrive at once and a length. Its prompts are others each
    time, but for what they share.

    Attributes:
        checkpoint: the source of a model that is run in this process, in any form that
            `ic.checkpoint.source` knows.
        url: an OpenAI-compatible server instead, as http://localhost:8000/v1. It is asked for
            completions of token ids.
        server_model: the name of the server's model; null is the first that it lists.
        token_env: environment variable that holds the server's token, if it asks for one.
        timeout_s: seconds without a word from the server after which it is given up.
        loop: of a model in this process: engine (`ic.inference.engine`), or generate, which is
            transformers' own loop over the same model.
        batches: requests at once.
        contexts: tokens of a prompt with its answer.
        output_tokens: tokens of each answer; an end token does not end it.
        shared_tokens: tokens that all prompts of a cell begin with, for the prefix cache.
        prompt_file: text whose tokens the prompts are cut from; null draws random tokens.
        vocab_size: random tokens are below it; null is the tokenizer's, or 256 for a server.
        repeats: how often each cell is measured.
        warmup: how often it is run before, unmeasured.
        seed: of the prompts.
        engine: sizes of the engine.
        output: results file, with a picture beside it. Cells that are in it already are not
            measured again.

    Raises:
        ValueError: none or both of `checkpoint` and `url`, an option of the other one, or a value
            out of its range.
    """

    server_model: str | None = None
    token_env: str = "IC_SERVE_TOKEN"
    timeout_s: float = 600.0
    loop: str = "engine"
    batches: list[int] = field(default_factory=lambda: [1, 16, 64])
    contexts: list[int] = field(default_factory=lambda: [4096])
    output_tokens: int = 256
    shared_tokens: int = 0
    prompt_file: str | None = None
    vocab_size: int | None = None
    repeats: int = 3
    warmup: int = 1
    seed: int = 0
    engine: EngineOptions = field(default_factory=EngineOptions)
    output: str = "runs/serving.json"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("loop", self.loop, LOOPS)
        self._check_source()
        for name in ("batches", "contexts"):
            values = getattr(self, name)
            if not values or min(values) < 1:
                raise ValueError(f"{name}={values}: give at least one, each at least 1")
            check_once(name, values)
        for name, least in (
            ("output_tokens", 2),
            ("shared_tokens", 0),
            ("repeats", 1),
            ("warmup", 0),
            ("seed", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least {least}")
        if self.vocab_size is not None and self.vocab_size < 1:
            raise ValueError(f"vocab_size={self.vocab_size}: must be at least 1")
        shortest = min(self.contexts) - self.output_tokens
        if shortest < max(1, self.shared_tokens):
            raise ValueError(
                f"contexts={self.contexts}: the shortest leaves {shortest} tokens to the prompt "
                f"beside output_tokens={self.output_tokens}, and it needs "
                f"{max(1, self.shared_tokens)}"
                + (" (shared_tokens)" if self.shared_tokens > 1 else "")
            )
        if not self.output.endswith(".json"):
            raise ValueError(f"output={self.output!r}: must end in .json")
        if self.timeout_s <= 0:
            raise ValueError(f"timeout_s={self.timeout_s}: must be above 0")

    def _check_source(self) -> None:
        if (self.checkpoint is None) == (self.url is None):
            given = "neither is" if self.url is None else "both are"
            raise ValueError(
                "benchmark serving needs checkpoint= (a model to run here) or url= (a server), "
                f"and {given} given"
            )
        if self.url is None:
            if self.server_model is not None:
                raise ValueError(f"server_model={self.server_model!r}: goes with url= alone")
            if self.loop == "engine" and max(self.batches, default=0) > self.engine.max_batch:
                raise ValueError(
                    f"batches={self.batches}: the engine runs engine.max_batch="
                    f"{self.engine.max_batch} requests at once; raise it"
                )
            if self.loop == "generate" and self.engine != EngineOptions():
                raise ValueError("engine: is of loop=engine; leave it out with loop=generate")
            return
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url={self.url!r}: must begin with http:// or https://")
        own = {"loop": "engine", "engine": EngineOptions(), "accelerator": "auto", "dtype": "auto"}
        own |= {
            "cache_dtype": "auto",
            "indexer": "auto",
            **dict.fromkeys(("attention", "norm", "rope"), "torch"),
        }
        for name, default in own.items():
            if getattr(self, name) != default:
                raise ValueError(f"{name}: is of a model that runs here; leave it out with url=")
        if self.prompt_file is not None and self.tokenizer is None:
            raise ValueError(
                "prompt_file: a server does not say how it cuts text into tokens; give the "
                "tokenizer's folder, tokenizer=FOLDER"
            )
        if self.vocab_size is None:
            self.vocab_size = _SERVER_VOCABULARY
