"""What was downloaded holds tests; where nothing was, this says so instead of passing in silence."""

from __future__ import annotations

import pytest

from tests.upstream.source import FOLDER, is_there

pytestmark = pytest.mark.upstream


def test_there_are_tests_to_run() -> None:
    if not is_there():
        pytest.skip(f"transformers' own tests are not in {FOLDER}; `make upstream` downloads them")
    from tests.upstream.mixins import ModelTesterMixin, TokenizerTesterMixin

    for mixin, least in ((ModelTesterMixin, 100), (TokenizerTesterMixin, 50)):
        assert sum(name.startswith("test_") for name in dir(mixin)) > least
