"""A byte-level BPE tokenizer trained on one's own text, as a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ic.checkpoint.commit import whole_folder
from ic.datamodules.chat_templates import TEMPLATES, set_chat_template
from ic.datamodules.make_tokenizer_options import MakeTokenizerOptions
from ic.datamodules.text_files import TextFiles, detect_format, resolve_files
from ic.model.byte_tokenizer import SPECIAL_TOKENS


@dataclass
class Corpus:
    """The documents of files, counted as they are read."""

    files: TextFiles
    num_documents: int = field(default=0, init=False)
    num_bytes: int = field(default=0, init=False)

    def __iter__(self) -> Iterator[str]:
        for index in range(len(self.files)):
            for _, text in self.files.documents(index):
                self.num_documents += 1
                self.num_bytes += len(text.encode())
                yield text


def open_corpus(options: MakeTokenizerOptions) -> Corpus:
    """The documents that the options name.

    Raises:
        ValueError: files that are not there, or cannot be read.
    """
    files = resolve_files(options.files, "files")
    kind = detect_format(files, options.format, "files")
    return Corpus(TextFiles(files, kind, options.text_column, "file"))


def train_tokenizer(options: MakeTokenizerOptions, corpus: Corpus) -> PreTrainedTokenizerFast:
    """Byte-level BPE (as GPT-2's), so that every text has tokens and decodes to itself.

    Digits are tokens of their own, so that equal digits are equal tokens wherever they stand.

    Raises:
        ValueError: there is no text in the files.
    """
    special = list(SPECIAL_TOKENS[:3])
    if options.chat_template in TEMPLATES:
        special += TEMPLATES[options.chat_template].tokens
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=options.vocab_size,
        min_frequency=options.min_frequency,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    if not corpus.num_bytes:
        raise ValueError(f"files={options.files}: no text in them")
    trained = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=special[0],
        eos_token=special[1],
        pad_token=special[2],
        extra_special_tokens=special[3:],
        clean_up_tokenization_spaces=False,
    )
    if options.chat_template is not None:
        set_chat_template(trained, options.chat_template)
    return trained


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """Write a tokenizer's folder whole, in place of one that is there."""
    with whole_folder(output.absolute()) as partial:
        tokenizer.save_pretrained(partial)
