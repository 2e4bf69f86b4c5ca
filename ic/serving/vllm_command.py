"""vLLM's own server on a model of ours: the command, which is shown and then run."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from ic.checkpoint.hugging_face import CONFIG, folder_model_type, weight_files
from ic.checkpoint.source import find_source
from ic.errors import UsageError, one_line
from ic.serving.options import ServeOptions, served_name

# vLLM's script `vllm` asks for a distribution of its name, which its build for CPUs has not.
MODULE = "vllm.entrypoints.openai.api_server"
# vLLM reads the token here, so that it stands in no list of processes and in no log.
TOKEN = "VLLM_API_KEY"
# Of `ic.model.MLAConfig`, which would load PyTorch.
_MODEL_TYPE = "infinite_context"
# vLLM chooses the class of a model by this list, which a run's checkpoints do not have.
_ARCHITECTURE = json.dumps({"architectures": ["MLAForCausalLM"]}, separators=(",", ":"))
_CACHE_ARGUMENT = "--kv-cache-dtype"
# What vLLM says without the token, in OpenAI's form.
_MIDDLEWARE = "ic.serving.vllm_plugin.unauthorized.OpenAIUnauthorized"
# Arguments of vLLM's that options of ours give: what is checked of these must be what is run.
_OURS = {
    "--model": "source=",
    "--served-model-name": "model_name=",
    "--host": "host=",
    "--port": "port=",
    "--uds": "host= and port=",
    "--dtype": "dtype=",
    "--tokenizer": "tokenizer=",
    "--api-key": "token_env= or token_file=, so that no list of processes shows it",
}
# Why a Python does not serve our models, in one line, or nothing.
_ASK = """
from importlib.metadata import entry_points
from ic.serving.vllm_plugin.versions import installed, refusal
plugins = entry_points(group="vllm.general_plugins")
ours = any(each.value.startswith("ic.serving.vllm_plugin") for each in plugins)
lacks = "its installation of infinite-context is older than the plugin; install it again"
print(refusal(installed()) or ("" if ours else lacks))
"""


def has_vllm(python: str | None) -> bool:
    """Whether vLLM is to be expected in a Python, by default this one."""
    return python is not None or find_spec("vllm") is not None


def check_vllm(python: str) -> None:
    """Refuse a Python that does not serve our models.

    Raises:
        UsageError: it cannot be run, or lacks this package, vLLM or a version that is supported.
    """
    if python == sys.executable and not has_vllm(None):
        raise UsageError(
            f"backend=vllm: vLLM is not installed in {python}; give the Python of its environment "
            "as vllm_python=, or choose backend=engine"
        )
    try:
        asked = subprocess.run([python, "-c", _ASK], capture_output=True, text=True)
    except OSError as error:
        raise UsageError(f"vllm_python={python}: {error.strerror}") from None
    if asked.returncode:
        last = asked.stderr.strip().rpartition("\n")[2] or f"it ended with {asked.returncode}"
        raise UsageError(
            f"vllm_python={python} cannot import this package, which vLLM needs there "
            f"({one_line(last)}); install it in that environment"
        )
    if why_not := asked.stdout.strip():
        raise UsageError(
            f"backend=vllm with {python}: {one_line(why_not)}; or choose backend=engine"
        )


def vllm_command(config: ServeOptions) -> list[str]:
    """The command line of vLLM's server.

    Raises:
        UsageError: a source, a tokenizer or a cache that vLLM does not load or have, or an
            argument that is given twice.
        CheckpointError: a folder without weights in safetensors.
    """
    source = find_source(config.source)
    if source.is_gguf:
        raise UsageError(
            f"source={config.source}: vLLM does not load this from a GGUF file; write a folder "
            "(python -m ic export), or choose backend=engine"
        )
    if config.tokenizer == "bytes":
        raise UsageError("tokenizer=bytes: vLLM needs a folder that holds a tokenizer")
    for name in _names(config):
        if name in _OURS:
            raise UsageError(f"vllm_arguments: {name} is given by {_OURS[name]}; leave it out")
    if config.indexer != "auto":
        raise UsageError(
            f"indexer={config.indexer}: vLLM has no cache for our index keys; leave it out, or set "
            "backend=engine"
        )
    weight_files(source.path)
    return [
        *(config.vllm_python or sys.executable, "-m", MODULE),
        f"--model={source.path}",
        f"--served-model-name={config.model_name or served_name(source.name)}",
        f"--host={config.host}",
        f"--port={config.port}",
        f"--dtype={config.dtype}",
        f"--middleware={_MIDDLEWARE}",
        *([] if config.tokenizer is None else [f"--tokenizer={config.tokenizer}"]),
        *_cache_arguments(config, source.path),
        *([f"--hf-overrides={_ARCHITECTURE}"] if _lacks_architecture(source.path) else []),
        *config.vllm_arguments,
    ]


def _names(config: ServeOptions) -> list[str]:
    """What `vllm_arguments` begin with, which vLLM takes with dashes and with underscores."""
    return [each.partition("=")[0].replace("_", "-") for each in config.vllm_arguments]


def _cache_arguments(config: ServeOptions, folder: Path) -> list[str]:
    """What vLLM is told that its cache holds: what was asked for, else what the folder says.

    Raises:
        UsageError: a cache that vLLM does not have, or two that are asked for.
    """
    asked = config.cache_dtype
    if _CACHE_ARGUMENT in _names(config):
        if asked != "auto":
            raise UsageError(
                f"cache_dtype={asked} gives vLLM its {_CACHE_ARGUMENT}, which vllm_arguments give "
                "too; leave one of them out"
            )
        return []
    saved = json.loads((folder / CONFIG).read_text()).get("cache_dtype", "auto")
    if asked == "int8":
        raise UsageError(
            "cache_dtype=int8: vLLM has no such cache for latents; choose fp8 or backend=engine"
        )
    if asked == "auto" and saved == "int8":
        raise UsageError(
            f"source={config.source} asks for an int8 cache, which vLLM does not have for latents; "
            "set cache_dtype=fp8, choose backend=engine, or for the model's own precision "
            f"vllm_arguments=[{_CACHE_ARGUMENT},auto]"
        )
    return [f"{_CACHE_ARGUMENT}=fp8"] if "fp8" in (asked, saved) else []


def _lacks_architecture(folder: Path) -> bool:
    """Whether a folder of ours does not say which class it is of: a checkpoint, not an export."""
    config = json.loads((folder / CONFIG).read_text())
    return folder_model_type(folder) == _MODEL_TYPE and not config.get("architectures")


def vllm_environment(token: str | None, environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of vLLM's server, with the token that it asks for, if it asks for one."""
    own = {name: value for name, value in environment.items() if name != TOKEN}
    return own if token is None else {**own, TOKEN: token}


def run_vllm(config: ServeOptions, token: str | None) -> int:
    """Show the command, and become vLLM's server, unless it is only to be shown.

    Raises:
        UsageError: as `vllm_command`.
    """
    command = vllm_command(config)
    print(shlex.join(command), flush=True)
    if config.dry_run:
        return 0
    os.execvpe(command[0], command, vllm_environment(token, os.environ))
