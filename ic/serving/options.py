"""What `serve` is asked. Imports no PyTorch: help and refusals come at once."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from ic.errors import check_choice
from ic.inference.engine.options import EngineOptions
from ic.inference.options import InferenceOptions, LoadOptions
from ic.serving.limits import check_limits

BACKENDS = ("auto", "vllm", "engine")


@dataclass
class LimitOptions:
    """What `backend=engine` bears of its clients.

    Attributes:
        body_bytes: largest body of a request.
        context_tokens: most tokens of a prompt with its answer; null is what the model has
            positions for and the cache has room for.
        requests: most answers in work at once, those that wait included; each choice of `n` and
            each prompt of a list counts. Further requests get status 429.
        read_s: seconds in which a request must have arrived whole.
        answer_s: seconds after which an answer that is not finished is given up.
        write_s: seconds that a client may leave what was sent to it unread.
        unread_steps: steps of a streamed answer that wait for a slow reader at most, before the
            answer is given up.
        drain_s: seconds that answers in work may take after SIGTERM.

    Raises:
        ValueError: a value out of its range.
    """

    body_bytes: int = 16 * 2**20
    context_tokens: int | None = None
    requests: int = 256
    read_s: float = 60.0
    answer_s: float = 3600.0
    write_s: float = 60.0
    unread_steps: int = 1024
    drain_s: float = 60.0

    def __post_init__(self) -> None:
        check_limits("limits", self)


@dataclass
class _Source:
    """The model; a class of its own because help shows the fields of the last base first."""

    source: str = "???"


@dataclass
class ServeOptions(LoadOptions, _Source):
    """A model behind OpenAI's routes.

    Attributes:
        source: the model, in any form that `ic.checkpoint.source` knows; of backend=vllm a folder.
        backend: vllm, or engine (this package's own); auto is vllm where it can be imported.
        host: address to listen on. Any but a loopback address needs a token.
        port: TCP port; with backend=engine 0 takes a free one, which the first line names.
        model_name: what clients call the model; null is the source's name, of a run without the
            step.
        token_env: environment variable that holds the token which clients must send. Where it is
            not set, none is asked for.
        token_file: file that holds the token, instead of the variable.
        engine: sizes of the engine; of backend=engine.
        limits: what is borne of clients; of backend=engine.
        access_log: print a line per request; of backend=engine.
        vllm_python: Python of the environment in which vLLM is installed; null is this one.
        vllm_arguments: further arguments of vLLM's server, such as [--max-model-len,32768].
        dry_run: print vLLM's command, and do not run it. A Python that `vllm_python` names is
            checked all the same; without one vLLM may be missing here.

    Raises:
        ValueError: a value out of its range, or an option of the other backend.
    """

    backend: str = "auto"
    host: str = "127.0.0.1"
    port: int = 8000
    model_name: str | None = None
    token_env: str = "IC_SERVE_TOKEN"
    token_file: str | None = None
    engine: EngineOptions = field(default_factory=EngineOptions)
    limits: LimitOptions = field(default_factory=LimitOptions)
    access_log: bool = False
    vllm_python: str | None = None
    vllm_arguments: list[str] = field(default_factory=list)
    dry_run: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("backend", self.backend, BACKENDS)
        if not 0 <= self.port < 2**16:
            raise ValueError(f"port={self.port}: must be from 0 (a free one) to {2**16 - 1}")
        if not self.host:
            raise ValueError("host is empty: give an address to listen on, such as 127.0.0.1")
        if self.model_name is not None and not self.model_name.strip():
            raise ValueError("model_name is empty: give a name, or null for the source's")
        if not self.token_env:
            raise ValueError("token_env is empty: give the name of an environment variable")
        if self.backend == "engine":
            self.refuse_vllm_options()

    def inference_options(self) -> InferenceOptions:
        """How the engine's model is loaded."""
        shared = {each.name: getattr(self, each.name) for each in fields(LoadOptions)}
        return InferenceOptions(checkpoint=self.source, **shared)

    def refuse_vllm_options(self) -> None:
        """Raises:
        ValueError: an option is set that only backend=vllm heeds.
        """
        self._refuse(
            ("vllm_python", "vllm_arguments", "dry_run"),
            "is for backend=vllm; leave it out, or choose that backend",
        )

    def refuse_engine_options(self) -> None:
        """Raises:
        ValueError: an option is set that only backend=engine heeds.
        """
        self._refuse(
            ("accelerator", "attention", "norm", "rope", "engine", "limits", "access_log"),
            "is for backend=engine; leave it out, choose that backend, or give vLLM's own argument "
            "in vllm_arguments",
        )
        if self.port == 0:
            raise ValueError("port=0: vLLM's server needs a port; give one from 1 on")

    def _refuse(self, names: tuple[str, ...], why: str) -> None:
        defaults: Any = type(self)(source=self.source)
        for name in names:
            if getattr(self, name) != getattr(defaults, name):
                raise ValueError(f"{name} {why}")


def served_name(name: str) -> str:
    """What clients call a source of this name, whichever step of a run it is."""
    return name.partition(", step ")[0]
