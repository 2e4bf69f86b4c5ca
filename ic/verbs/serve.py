"""a model behind OpenAI's routes: with vLLM, or with this package's own engine"""

from __future__ import annotations

from importlib.util import find_spec

from ic.checkpoint.source import find_source
from ic.errors import UsageError
from ic.serving.listening import check_address
from ic.serving.options import ServeOptions
from ic.serving.token import check_reach, read_token
from ic.serving.vllm_command import check_vllm, has_vllm, run_vllm, vllm_command

Config = ServeOptions
# What the extra `serve` brings, by the names to import.
_NEEDED = ("fastapi", "uvicorn", "prometheus_client")


def check(config: ServeOptions) -> None:
    """Refuse, before PyTorch is loaded, what cannot be served.

    Raises:
        UsageError: a package or vLLM is missing, other machines would need no token, or the
            address is taken.
        CheckpointError: the source is none.
    """
    find_source(config.source)
    token = read_token(config.token_env, config.token_file)
    check_reach(config.host, token, config.token_env)
    if _backend(config) == "vllm":
        config.refuse_engine_options()
        command = vllm_command(config)
        if config.vllm_python is not None or not config.dry_run:
            check_vllm(command[0])
        if config.dry_run:
            return
    else:
        config.refuse_vllm_options()
        if missing := [name for name in _NEEDED if find_spec(name) is None]:
            raise UsageError(
                f"backend=engine needs {', '.join(missing)}: pip install 'infinite-context[serve]'"
            )
    check_address(config.host, config.port)


def run(config: ServeOptions) -> int:
    """Serve until SIGTERM or Ctrl-C."""
    token = read_token(config.token_env, config.token_file)
    if _backend(config) == "vllm":
        return run_vllm(config, token)
    from ic.serving.server import serve

    return serve(config, token)


def _backend(config: ServeOptions) -> str:
    """vllm or engine; auto is vllm where it can be imported."""
    if config.backend != "auto":
        return config.backend
    return "vllm" if has_vllm(config.vllm_python) else "engine"
