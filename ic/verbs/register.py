"""put a model into MLflow's registry, with its card, signature and evaluation"""

from __future__ import annotations

from ic.run.registry_options import RegisterOptions as Config
from ic.tracking.server import server_uri


def check(config: Config) -> None:
    """Refuse a server that is not named, before PyTorch is loaded."""
    server_uri("uri", config.uri)


def run(config: Config) -> int:
    """Write the files of the version, upload them, name it."""
    from ic.run.register import register

    version = register(config)
    print(f"{version}, {version.name}@{config.alias}: sha256 {(version.digest or '')[:16]}")
    return 0
