"""continue a prompt or a file of prompts, or converse, with any model"""

from __future__ import annotations

from ic.inference.generate.options import GenerateOptions as Config


def check(config: Config) -> None:
    """Refuse what can be refused before PyTorch is loaded."""
    config.check_prompts()


def run(config: Config) -> int:
    """Continue prompts; the text of a single one appears as it is generated."""
    from ic.inference.generate.run import generate

    return generate(config)
