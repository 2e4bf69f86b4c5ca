"""The address of an MLflow server. Imports no MLflow: help and refusals come at once."""

from __future__ import annotations

import importlib.util
import os
from urllib.parse import urlsplit

from ic.errors import UsageError

VARIABLE = "MLFLOW_TRACKING_URI"
_HINT = "give a server's address, such as http://127.0.0.1:5000, where `make mlflow` starts one"


def check_server(key: str, uri: str) -> None:
    """Raises:
    UsageError: the address is none of a server, or holds a password, which errors and the run's
        configuration would show.
    """
    if "@" in uri:
        raise UsageError(
            f"{key}: the address holds a user or a password; leave them out and set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )
    try:
        parts = urlsplit(uri)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is no number
        usable = False
    if not usable:
        raise UsageError(f"{key}={uri}: no address of an MLflow server; {_HINT}")


def server_uri(key: str, given: str | None) -> str:
    """The address given, or that of the environment.

    Args:
        key: the option, for an error.

    Raises:
        UsageError: there is neither, the environment's is no address, or MLflow's client is not
            installed.
    """
    if importlib.util.find_spec("mlflow") is None:
        raise UsageError(
            f"{key}: MLflow's client is not installed here; pip install 'infinite-context[mlflow]'"
        )
    uri = given or os.environ.get(VARIABLE)
    if not uri:
        raise UsageError(f"{key}: no address is given, and {VARIABLE} is not set: {_HINT}")
    check_server(key if given else VARIABLE, uri)
    return uri


def fail_soon() -> None:
    """Have MLflow's client give up on a server that does not answer within seconds, where the user
    has not set otherwise; and tell nobody else that it is used.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "15")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
