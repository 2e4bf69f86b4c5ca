"""an original and its conversion: logits, perplexity, cache, needles, answers and speed"""

from __future__ import annotations

from ic.conversion.parity.options import ParityConfig

Config = ParityConfig


def run(config: ParityConfig) -> int:
    """Measure both; print the table of the report's top, write the report."""
    from rich.console import Console

    from ic.conversion.parity.run import measure_parity
    from ic.display.table import print_table
    from ic.files.run_folder import ParityFolder

    results = measure_parity(config)
    console = Console()
    shown = results["shown"]
    print_table(shown["heads"], shown["lines"], title="parity", console=console)
    for sentence in (*results["notes"], *results["words"]):
        console.print(sentence, highlight=False)
    console.print(
        f"report: {ParityFolder(config.output).document}", highlight=False, soft_wrap=True
    )
    return 0
