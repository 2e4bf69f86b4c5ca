"""The engine's server: listens, loads the model, serves, and ends without losing an answer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from ic.inference.engine.threaded import ThreadedEngine
from ic.inference.loading import load_source
from ic.inference.model_facts import positions_of
from ic.serving.app import build_app
from ic.serving.draining import Server, build_server, serve_until_stopped
from ic.serving.listening import listen, url_of
from ic.serving.options import ServeOptions, served_name
from ic.serving.prompts import Prompts
from ic.serving.service import Service
from ic.serving.token import Token


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
        yield build_server(
            build_app(service, name, context, None if token is None else Token(token)),
            listening,
            service.admission,
            limits,
            f"serving {name} at {url_of(listening)}, up to {context:,} tokens per request",
            token,
            lifespan="off",
            access_log=config.access_log,
        )


def serve(config: ServeOptions, token: str | None) -> int:
    """Serve a model with the engine until SIGTERM or Ctrl-C.

    Returns:
        The exit code, 0.

    Raises:
        UsageError, ValueError: as `ready`.
        KeyboardInterrupt: after Ctrl-C, once the answers in work are finished.
    """
    return serve_until_stopped(ready(config, token))


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
