"""Text token by token against decoding the whole, for tokenizers of every kind."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ic.inference.engine.detokenize import Detokenizers, _BytesDecoder, _WindowDecoder
from ic.inference.engine.request import Sampling
from ic.model.byte_tokenizer import ByteTokenizer
from tests.evaluation.small_bpe import small_bpe

TEXTS = (
    "Plain text, with  two spaces and a line\nbreak.",
    "Ünïcödé, 漢字, עברית, हिन्दी, 👩‍👩‍👧‍👦 and 🏳️‍🌈.",
    " begins and ends with a space ",
    "\ufffd is a character, too \ufffd",
)
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def llama(strip: bool) -> PreTrainedTokenizerFast:
    """As Llama 2's of sentencepiece: pieces with ▁ for a space, and bytes for other characters."""
    pieces = ["<unk>", "<s>", "</s>", *_BYTES, *"▁abcdeghilnoprstuwxy,.", "▁a"]
    model = models.BPE(
        {piece: i for i, piece in enumerate(pieces)},
        [("▁", "a")],
        unk_token="<unk>",
        byte_fallback=True,
    )
    backend = Tokenizer(model)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*parts, *([decoders.Strip(" ", 1, 0)] if strip else [])])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def metaspace() -> PreTrainedTokenizerFast:
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((f"▁{word}", -2.0) for word in ("the", "a", "key"))]
    pieces += [(piece, -3.0) for piece in ("▁", "s", "é", "漢", ",", ".")]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def suffixes() -> PreTrainedTokenizerFast:
    """Words end with a mark, as in the first BPE of GPT."""
    words = ["<unk>", "the</w>", "key</w>", "k", "ey</w>", "é</w>"]
    backend = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], unk_token="<unk>"))
    backend.decoder = decoders.BPEDecoder("</w>")
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def with_added() -> PreTrainedTokenizerFast:
    """Byte-level BPE with added tokens that are shown, one of them outside the bytes' spelling."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(small_bpe().backend_tokenizer.to_str()),
        bos_token="<s>",
        eos_token="<|end|>",
    )
    tokenizer.add_tokens([AddedToken("<tool>"), AddedToken("a 漢 token")])
    return tokenizer


def wrapped() -> PreTrainedTokenizerFast:
    """Byte-level BPE whose decoder is the first of a sequence, as some are saved."""
    tokenizer = with_added()
    tokenizer.backend_tokenizer.decoder = decoders.Sequence([decoders.ByteLevel()])
    return tokenizer


TOKENIZERS: dict[str, Any] = {
    "wrapped": wrapped(),
    "bytes": ByteTokenizer(),
    "byte-level BPE": with_added(),
    "Llama": llama(strip=True),
    "Llama without strip": llama(strip=False),
    "Metaspace": metaspace(),
    "suffixes": suffixes(),
}
named = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS.keys())


def pieces(tokenizer: Any, ids: list[int], **asked: Any) -> list[str]:
    detokenizer = Detokenizers(tokenizer).begin(Sampling(**asked))
    found = []
    for token in ids:
        found.append(detokenizer.push(token))
        if detokenizer.stopped:
            return found
    return [*found, detokenizer.finish()]


@named
def test_pieces_are_the_whole_text(tokenizer: Any) -> None:
    """Any tokens: halves of characters, special and unknown tokens, ids beyond the vocabulary."""
    generator = random.Random(0)
    for _ in range(300):
        ids = generator.choices(range(len(tokenizer) + 4), k=generator.randrange(1, 30))
        found = pieces(tokenizer, ids)
        assert "".join(found) == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("name", ["bytes", "byte-level BPE"])
@given(st.lists(st.sampled_from([*b"ab\xc3\xa9\xe6\xbc\xa2\xf0\x9f\x98\x80\xed\xa0\x80\xff"])))
@example([0xF0, 0x9F, 0x98])
def test_broken_characters_are_replaced_as_in_the_whole(name: str, text: list[int]) -> None:
    tokenizer, ids = TOKENIZERS[name], text
    if name != "bytes":
        ids = [tokenizer.convert_tokens_to_ids(bytes_to_unicode()[byte]) for byte in text]
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", ["bytes", "byte-level BPE", "wrapped", "Llama without strip"])
def test_no_piece_is_half_a_character(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    if name.startswith("Llama"):
        known = tokenizer.get_vocab()
        ids = []
        for character in text.replace(" ", "▁"):
            spelled = [f"<0x{byte:02X}>" for byte in character.encode()]
            ids += [known[t] for t in ([character] if character in known else spelled)]
    else:
        ids = tokenizer.encode(text, add_special_tokens=False)
    found = pieces(tokenizer, ids)
    assert "".join(found) == text
    assert sum(piece.count("\ufffd") for piece in found) == text.count("\ufffd")
    if name != "Llama without strip":  # whose runs of bytes wait for their end
        at = 0
        for number, piece in enumerate(found, 1):
            at += len(piece)
            if "\ufffd" not in text:
                assert text[:at] == tokenizer.decode(ids[:number]).rstrip("\ufffd"), "it came late"


@named
def test_each_kind_has_its_decoder(tokenizer: Any) -> None:
    """The one for bytes is the faster one."""
    of_bytes = tokenizer in (TOKENIZERS["bytes"], TOKENIZERS["byte-level BPE"])
    decoder = Detokenizers(tokenizer).begin(Sampling())._decoder
    assert isinstance(decoder, _BytesDecoder if of_bytes else _WindowDecoder)


def cut(text: str, stops: tuple[str, ...]) -> tuple[str, bool]:
    """Character by character: up to the first that completes a stop string."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


@given(
    st.text("abé", max_size=12),
    st.lists(st.text("abé", min_size=1, max_size=4), min_size=1, max_size=3).map(tuple),
)
@example("aab", ("aab",))
@example("abéa", ("abéa", "bé"))
def test_stop_strings_end_the_text(text: str, stops: tuple[str, ...]) -> None:
    """However the text is cut into tokens; and nothing of them is ever shown."""
    bpe = TOKENIZERS["byte-level BPE"]
    expected, stopped = cut(text, stops)
    bytes_of_text = (TOKENIZERS["bytes"], list(text.encode()))
    for chosen, ids in ((bpe, bpe.encode(text, add_special_tokens=False)), bytes_of_text):
        detokenizer = Detokenizers(chosen).begin(Sampling(stop=stops))
        shown = ""
        for token in ids:
            shown += detokenizer.push(token)
            assert expected.startswith(shown), "text that belongs to a stop string was shown"
            if detokenizer.stopped:
                break
        assert detokenizer.stopped == stopped
        if not stopped:
            shown += detokenizer.finish()
        assert shown == expected


def test_one_token_may_complete_several_stop_strings() -> None:
    """The first to be complete counts, and of those that end alike the longest."""
    tokenizer = TOKENIZERS["byte-level BPE"]
    token = tokenizer.convert_tokens_to_ids("a 漢 token")
    for stops, shown in ((("tok", "漢"), "a "), (("oken", "token"), "a 漢 "), (("n", "a"), "")):
        assert pieces(tokenizer, [token], stop=stops) == [shown]


def test_text_is_not_held_longer_than_it_must_be() -> None:
    ids = list(b"one END two EN three")
    found = pieces(ByteTokenizer(), ids, stop=("END!",))
    assert found[3:8] == [" ", "", "", "", "END "]
    assert "".join(found) == "one END two EN three"
    assert pieces(ByteTokenizer(), ids[:6], stop=("END!",))[-1] == "EN"


def test_end_tokens() -> None:
    """They have no text; what waits for more comes out."""
    tokenizer = ByteTokenizer()
    end = tokenizer.eos_token_id
    ids = [*b"ab", 0xC3, end, *b"cd"]
    makers = Detokenizers(tokenizer, [end])
    answer = makers.begin(Sampling(stop=("bx",)))
    assert [answer.push(token) for token in ids[:4]] == ["a", "", "", "b\ufffd"]
    assert answer.stopped
    ignoring = makers.begin(Sampling(ignore_end=True, stop_token_ids=(ord("d"),)))
    assert [ignoring.push(token) for token in ids] == ["a", "b", "", "", "\ufffdc", ""]
    assert ignoring.stopped
