"""The routes: OpenAI's, and what whoever runs the server looks at."""

from __future__ import annotations

import time
from typing import Any

from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from ic.serving.error_responses import answer_errors
from ic.serving.errors import ApiError, failed, shutting_down
from ic.serving.guard import OPEN, Guard
from ic.serving.requests import ChatBody, CompletionBody
from ic.serving.service import Service
from ic.serving.token import Token

# Failures of the engine after which a server had better be begun again.
_ILL = 3


def build_app(service: Service, name: str, context_tokens: int, token: Token | None) -> ASGIApp:
    """The application that a server runs.

    Args:
        name: what clients call the model.
        context_tokens: most tokens of a prompt with its answer.
        token: what clients must send, if anything.
    """
    app = FastAPI(title="InfiniteContext", docs_url=None, redoc_url=None)
    model = {
        "id": name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "infinite-context",
        "max_model_len": context_tokens,  # vLLM's field
    }

    async def health() -> Response:
        if service.admission.draining:
            raise shutting_down()
        if (failures := service.metrics.failures_in_a_row) >= _ILL:
            raise failed(f"The engine has failed {failures} times since its last answer.")
        return JSONResponse({"status": "ok"})

    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [model]})

    async def one_model(id: str) -> Response:
        if id != name:
            raise ApiError(
                404,
                f"The model '{id}' does not exist. This server has '{name}'.",
                param="model",
                code="model_not_found",
            )
        return JSONResponse(model)

    app.add_api_route(OPEN, health, methods=["GET"])
    app.add_api_route("/metrics", metrics, methods=["GET"])
    app.add_api_route("/v1/models", models, methods=["GET"])
    app.add_api_route("/v1/models/{id:path}", one_model, methods=["GET"])
    app.add_api_route(
        "/v1/completions", service.complete, methods=["POST"], openapi_extra=_body(CompletionBody)
    )
    app.add_api_route(
        "/v1/chat/completions", service.chat, methods=["POST"], openapi_extra=_body(ChatBody)
    )
    answer_errors(app)
    routes = (OPEN, "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions")
    return Guard(app, token, service.metrics, routes)


def _body(kind: type[CompletionBody] | type[ChatBody]) -> dict[str, Any]:
    """What /openapi.json says of a body; the route reads it itself, within the limits."""
    schema = kind.model_json_schema()
    return {"requestBody": {"content": {"application/json": {"schema": schema}}, "required": True}}
