"""The router's application and its server."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress

import httpx2
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ic.files.run_folder import ExperimentFolder
from ic.serving.ab.backends import Backends
from ic.serving.ab.experiment import Experiment, alone
from ic.serving.ab.forwarding import Forwarder
from ic.serving.ab.metrics import NO_VERSION, RouterMetrics
from ic.serving.ab.options import RouteOptions
from ic.serving.ab.router import VERSION_HEADER, Router
from ic.serving.bodies import read_body
from ic.serving.draining import Server, build_server, serve_until_stopped
from ic.serving.error_responses import answer_errors
from ic.serving.errors import invalid, shutting_down
from ic.serving.guard import OPEN, Guard
from ic.serving.listening import listen, url_of
from ic.serving.token import Token

# Seconds between two looks at the file of the split.
_FOLLOW_S = 1.0
_FEEDBACK_BYTES = 4096
_ID = re.compile(r"[0-9a-f]{32}")


class _Counted:
    """ASGI middleware: counts every response by the version that its header names."""

    def __init__(self, app: ASGIApp, metrics: RouterMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start" and scope["path"].startswith("/v1/"):
                version = Headers(raw=message.get("headers", [])).get(VERSION_HEADER, NO_VERSION)
                self._metrics.response(version, message["status"])
            await send(message)

        await self._app(scope, receive, counted)


def build_app(
    router: Router,
    experiment: Experiment,
    backends: Backends,
    metrics: RouterMetrics,
    options: RouteOptions,
    token: Token | None,
    http: httpx2.AsyncClient,
) -> ASGIApp:
    """The application that the router's server runs."""

    async def health(_: Request) -> Response:
        if router.admission.draining:
            raise shutting_down()
        return JSONResponse({"status": "ok"})

    async def text(_: Request) -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def state(_: Request) -> Response:
        weights = experiment.split.weights
        versions = {
            version: {
                "weight": weight,
                "servers": [
                    {"url": each.url, "available": each.available, "in_flight": each.in_flight}
                    for each in backends.of[version]
                ],
            }
            for version, weight in weights.items()
        }
        told = {"experiment": options.experiment, "control": experiment.control}
        return JSONResponse({**told, "versions": versions, "rolled_back": experiment.rolled_back})

    async def feedback(request: Request) -> Response:
        body = await read_body(request, _FEEDBACK_BYTES, options.limits.read_s)
        id, score = _parse_feedback(body)
        experiment.log(what="feedback", id=id, score=score)
        return JSONResponse({"status": "ok"})

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        tasks = [
            asyncio.create_task(backends.watch(http, options.health)),
            asyncio.create_task(_follow(experiment)),
        ]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await http.aclose()

    app = Starlette(
        routes=[
            Route(OPEN, health),
            Route("/metrics", text),
            Route("/ab", state),
            Route("/ab/feedback", feedback, methods=["POST"]),
            Route("/v1/{path:path}", router.forward, methods=["GET", "POST"]),
        ],
        lifespan=lifespan,
    )
    answer_errors(app)
    return _Counted(Guard(app, token, None, ()), metrics)


async def _follow(experiment: Experiment) -> None:
    while True:
        experiment.follow_file()
        await asyncio.sleep(_FOLLOW_S)


def _parse_feedback(body: bytes) -> tuple[str, float]:
    """Raises:
    ApiError: no id of an answer, or no score from 0 to 1.
    """
    found = None
    with suppress(ValueError, RecursionError):
        found = json.loads(body)
    if not isinstance(found, dict) or found.keys() != {"id", "score"}:
        raise invalid('Send {"id": the header x-ic-id of an answer, "score": from 0 to 1}.')
    id, score = found["id"], found["score"]
    if not isinstance(id, str) or not _ID.fullmatch(id):
        raise invalid("'id' must be the header x-ic-id of an answer.", "id", "invalid_value")
    if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= 1:
        raise invalid("'score' must be a number from 0 to 1.", "score", "invalid_value")
    return id, float(score)


@contextmanager
def ready(options: RouteOptions, token: str | None) -> Iterator[Server]:
    """A router that has its address and its folder.

    Raises:
        UsageError: the address or the folder is taken, or the folder holds another experiment.
    """
    limits = options.limits
    with ExitStack() as stack:
        listening = stack.enter_context(listen(options.host, options.port))
        stack.enter_context(alone(ExperimentFolder(options.folder)))
        experiment = Experiment(options)
        backends = Backends.build(options.versions, options.health)
        metrics = RouterMetrics(experiment, backends)
        http = httpx2.AsyncClient(
            timeout=httpx2.Timeout(None, connect=limits.connect_s),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=256),
            follow_redirects=False,
            trust_env=False,
        )
        http.headers.clear()
        router = Router(options, experiment, backends, Forwarder(http, limits), metrics)
        weights = ", ".join(f"{name} {w:g} %" for name, w in experiment.split.weights.items())
        secret = None if token is None else Token(token)
        yield build_server(
            build_app(router, experiment, backends, metrics, options, secret, http),
            listening,
            router.admission,
            limits,
            f"routing {options.experiment} at {url_of(listening)} to {weights}; log: "
            f"{experiment.folder.outcomes}",
            token,
            lifespan="on",
        )


def route(options: RouteOptions, token: str | None) -> int:
    """Route until SIGTERM or Ctrl-C.

    Returns:
        The exit code, 0.

    Raises:
        UsageError: as `ready`.
        KeyboardInterrupt: after Ctrl-C, once the answers in work are finished.
    """
    return serve_until_stopped(ready(options, token))
