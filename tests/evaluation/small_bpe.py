"""A tokenizer of few merges that puts a token of its own before every text, and chats."""

from __future__ import annotations

from functools import cache

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

_TEXTS = [
    "You will be given a graph as a list of directed edges. User: write a poem about the sea.",
    "Assistant: The sea was calm and the old boat came home. Find the parents of the node.",
    "A letter about tea; a recipe for bread; the news of the day, and a riddle about an apple.",
]
_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>\n"
    "{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@cache
def small_bpe() -> PreTrainedTokenizerFast:
    """Trained on three sentences; ends its turns with `<|end|>`, its end token."""
    special = ["<s>", "<|end|>", "<|user|>", "<|assistant|>"]
    bpe = Tokenizer(BPE())
    bpe.pre_tokenizer = ByteLevel(add_prefix_space=False)
    bpe.decoder = ByteLevelDecoder()
    alphabet = ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=420, special_tokens=special, initial_alphabet=alphabet)
    bpe.train_from_iterator(_TEXTS * 3, trainer)
    bpe.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="<|end|>",
        additional_special_tokens=special[2:],
    )
    tokenizer.chat_template = _TEMPLATE
    return tokenizer
