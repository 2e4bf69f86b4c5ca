"""The engine's server: listens, loads the model, serves, and ends without losing an answer."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType

import uvicorn

from ic.inference.engine.threaded import ThreadedEngine
from ic.inference.loading import load_source
from ic.inference.model_facts import positions_of
from ic.serving.admission import Admission
from ic.serving.app import build_app
from ic.serving.connection import connection_class
from ic.serving.listening import BACKLOG, listen
from ic.serving.options import ServeOptions, served_name
from ic.serving.prompts import Prompts
from ic.serving.service import Service
from ic.serving.token import Token

# After the answers in work were given up, until their errors are sent.
_LAST_WORDS_S = 5


class Server(uvicorn.Server):
    """Ends on SIGTERM and Ctrl-C when the answers in work are finished, up to a limit.

    Attributes:
        interrupted: whether it was Ctrl-C.

    Args:
        listening: the socket that clients connect to.
        greeting: printed once they are answered.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        listening: socket.socket,
        admission: Admission,
        drain_s: float,
        greeting: str,
    ) -> None:
        super().__init__(config)
        self.interrupted = False
        self._listening = listening
        self._admission = admission
        self._drain_s = drain_s
        self._greeting = greeting
        self._deadline = 0.0

    @property
    def port(self) -> int:
        return int(self._listening.getsockname()[1])

    def serve_clients(self) -> None:
        """Run until a signal comes, in the main thread, or `handle_exit` is called."""
        self.run(sockets=[self._listening])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(self._greeting, flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal takes no further request, the second gives up those in work."""
        self.interrupted |= sig == signal.SIGINT
        again = self._admission.draining
        self._admission.draining = True
        self._deadline = time.monotonic() + (0.0 if again else self._drain_s)

    async def on_tick(self, counter: int) -> bool:
        """Asked ten times per second whether to end."""
        leave = await super().on_tick(counter)
        if not self._admission.draining:
            return leave
        late_s = time.monotonic() - self._deadline
        if late_s >= 0:
            self._admission.stopping.set()
        return self._admission.in_work == 0 or late_s > _LAST_WORDS_S


@contextmanager
def ready(config: ServeOptions, token: str | None) -> Iterator[Server]:
    """A server that has its model and its address. Its engine ends with the context.

    Raises:
        UsageError: the address is taken, before the model is loaded.
        ValueError: the model cannot be loaded, or not served so.
    """
    limits = config.limits
    with ExitStack() as stack:
        listening = stack.enter_context(listen(config.host, config.port))
        loaded = load_source(config.inference_options())
        engine = ThreadedEngine(loaded, config.engine)
        stack.callback(engine.close)
        name = config.model_name or served_name(loaded.name)
        context = _context_tokens(config, positions_of(loaded.model.config), engine)
        prompts = Prompts(loaded, name, context)
        stack.callback(prompts.close)
        service = Service(engine, prompts, limits, name)
        host, port = listening.getsockname()[:2]
        address = f"[{host}]" if ":" in host else host
        settings = uvicorn.Config(
            build_app(service, name, context, None if token is None else Token(token)),
            http=connection_class(limits.read_s, limits.write_s),
            ws="none",
            lifespan="off",
            server_header=False,
            access_log=config.access_log,
            log_level="info" if config.access_log else "warning",
            timeout_graceful_shutdown=_LAST_WORDS_S,
            backlog=BACKLOG,
        )
        greeting = (
            f"serving {name} at http://{address}:{port}/v1, up to {context:,} tokens per request; "
            + ("clients send the token" if token else "clients send no token")
        )
        yield Server(settings, listening, service.admission, limits.drain_s, greeting)


def serve(config: ServeOptions, token: str | None) -> int:
    """Serve a model with the engine until SIGTERM or Ctrl-C.

    Returns:
        The exit code, 0.

    Raises:
        UsageError, ValueError: as `ready`.
        KeyboardInterrupt: after Ctrl-C, once the answers in work are finished.
    """
    with ready(config, token) as server:
        server.serve_clients()
    if server.interrupted:
        raise KeyboardInterrupt
    return 0


def _context_tokens(config: ServeOptions, positions: int, engine: ThreadedEngine) -> int:
    """Most tokens of a prompt with its answer.

    Raises:
        ValueError: more is asked for than the model or the cache holds.
    """
    cache = engine.stats().pages_total * config.engine.page_tokens
    asked = config.limits.context_tokens
    if asked is None:
        return min(positions, cache)
    if asked > positions:
        raise ValueError(
            f"limits.context_tokens={asked}: the model has {positions} positions; lower it"
        )
    if asked > cache:
        raise ValueError(
            f"limits.context_tokens={asked}: the cache holds {cache} tokens; lower it, or raise "
            "engine.cache_tokens"
        )
    return asked
