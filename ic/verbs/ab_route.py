"""a router that gives each user one version of a model, and rolls back one that fails"""

from __future__ import annotations

from importlib.util import find_spec

from ic.errors import UsageError
from ic.serving.ab.options import RouteOptions
from ic.serving.listening import check_address
from ic.serving.token import check_reach, read_token

Config = RouteOptions
LOADS_PYTORCH = False
# What the extra `serve` brings, by the names to import.
_NEEDED = ("starlette", "uvicorn", "prometheus_client")


def check(config: RouteOptions) -> None:
    """Raises:
    UsageError: a package is missing, other machines would need no token, or the address is taken.
    """
    token = read_token(config.token_env, config.token_file)
    check_reach(config.host, token, config.token_env)
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        raise UsageError(
            f"ab route needs {', '.join(missing)}: pip install 'infinite-context[serve]'"
        )
    check_address(config.host, config.port)


def run(config: RouteOptions) -> int:
    """Route until SIGTERM or Ctrl-C."""
    from ic.serving.ab.app import route

    return route(config, read_token(config.token_env, config.token_file))
