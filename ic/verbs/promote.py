"""make a registered model the champion, if it passes its gate; or go back to the one before"""

from __future__ import annotations

from ic.run.registry_options import PromoteOptions as Config
from ic.tracking.server import server_uri


def check(config: Config) -> None:
    """Refuse a server that is not named, before PyTorch is loaded."""
    server_uri("uri", config.uri)


def run(config: Config) -> int:
    """Ask the gates, then move the alias."""
    from ic.run.promote import promote, roll_back

    for line in roll_back(config) if config.roll_back else promote(config):
        print(line)
    return 0
