from pathlib import Path

import pytest

from tests.evaluation.made_up_books import write_books


@pytest.fixture(scope="module")
def books(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("haystack") / "books"
    write_books(folder)
    return folder
