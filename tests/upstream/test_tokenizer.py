"""transformers' common tokenizer tests on the byte tokenizer, and on ByT5's beside it."""

from __future__ import annotations

import shutil
import tempfile
import unittest
from typing import ClassVar

import pytest
from transformers import ByT5Tokenizer, PreTrainedTokenizer

from ic.model.byte_tokenizer import ByteTokenizer
from tests.upstream.mixins import TokenizerTesterMixin, except_for

pytestmark = pytest.mark.upstream


class OnDisk(TokenizerTesterMixin):
    """Writes the tokenizer to a folder first, where theirs would download one."""

    tokenizer_class: ClassVar[type[PreTrainedTokenizer]]
    test_seq2seq = False
    test_tokenizer_from_extractor = False
    integration_expected_tokens = None

    @classmethod
    def setUpClass(cls) -> None:
        cls.tmpdirname = tempfile.mkdtemp()
        cls.tokenizer_class().save_pretrained(cls.tmpdirname)
        cls.tokenizers_list = [(cls.tokenizer_class, cls.tmpdirname, {})]
        cls._data = "A text of several words.\nAnd a second line: größe, 长.\n"

    @classmethod
    def tearDownClass(cls) -> None:
        shutil.rmtree(cls.tmpdirname)


SPACES = "expects that spaces around words are no tokens; to a byte tokenizer they are"


@except_for({"test_pretokenized_inputs": SPACES})
class ByteTokenizerTest(OnDisk, unittest.TestCase):
    tokenizer_class = ByteTokenizer


@except_for({"test_pretokenized_inputs": SPACES})
class ByT5TokenizerTest(OnDisk, unittest.TestCase):
    tokenizer_class = ByT5Tokenizer
