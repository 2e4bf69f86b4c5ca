"""continue a prompt or a file of prompts, or converse, with any model"""

from __future__ import annotations

from ic.checkpoint.source import find_source
from ic.inference.generate.options import GenerateOptions as Config


def check(config: Config) -> None:
    """Refuse what can be refused before PyTorch is loaded: prompts, and a source that is none."""
    config.check_prompts()
    find_source(config.checkpoint)


def run(config: Config) -> int:
    """Continue prompts; the text of a single one appears as it is generated."""
    from ic.inference.generate.run import generate

    return generate(config)
