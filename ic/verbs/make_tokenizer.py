"""train a BPE tokenizer on your own text"""

from __future__ import annotations

from pathlib import Path

from ic.datamodules.make_tokenizer_options import MakeTokenizerOptions as Config


def run(config: Config) -> int:
    """Train a tokenizer and write its folder."""
    from rich.console import Console

    from ic.datamodules.train_tokenizer import open_corpus, save_tokenizer, train_tokenizer

    corpus = open_corpus(config)
    tokenizer = train_tokenizer(config, corpus)
    save_tokenizer(tokenizer, Path(config.output))
    first = next(iter(open_corpus(config)))[:100_000]
    per_token = len(first.encode()) / max(1, len(tokenizer(first)["input_ids"]))
    fewer = f" (the text gives no more than that of vocab_size={config.vocab_size})"
    print_line = Console(soft_wrap=True, highlight=False).print
    print_line(
        f"{len(tokenizer):,} tokens{fewer if len(tokenizer) < config.vocab_size else ''} from "
        f"{corpus.num_documents:,} document{'' if corpus.num_documents == 1 else 's'}, "
        f"{corpus.num_bytes:,} bytes; the first document has {per_token:.2f} bytes per token"
    )
    print_line(f"use it with tokenizer={config.output}")
    return 0
