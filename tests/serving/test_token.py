"""Where a token comes from, and where one is needed."""

from __future__ import annotations

from pathlib import Path

import pytest

from ic.errors import UsageError
from ic.serving.token import Token, check_reach, is_loopback, read_token

TOKEN = "a-token-of-sixteen-or-more"


def test_where_it_comes_from(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(f"  {TOKEN}\n")
    assert read_token("IT", None, {}) is None
    assert read_token("IT", None, {"IT": TOKEN}) == TOKEN
    assert read_token("IT", str(file), {}) == TOKEN
    with pytest.raises(UsageError, match="holds a token, too"):
        read_token("IT", str(file), {"IT": TOKEN})


@pytest.mark.parametrize(
    "text", ["", "short", "fifteen-letters", "with a space in it", "größe" * 4]
)
def test_what_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "token").write_text(text, encoding="utf-8")
    for variable, file in (({"IT": text}, None), ({}, str(tmp_path / "token"))):
        with pytest.raises(UsageError, match="holds no token") as refused:
            read_token("IT", file, variable)
        assert not text or text not in str(refused.value).replace(str(tmp_path), "")


def test_it_matches_itself_alone_and_is_not_shown() -> None:
    token = Token(TOKEN)
    assert token.matches(TOKEN.encode())
    for other in (b"", TOKEN[:-1].encode(), f"{TOKEN} ".encode(), TOKEN.upper().encode(), b"\xff"):
        assert not token.matches(other)
    assert TOKEN not in repr(token)


def test_where_it_is_needed() -> None:
    for host in ("127.0.0.1", "127.1.2.3", "localhost", "::1"):
        assert is_loopback(host)
        check_reach(host, None, "IT")
    for host in ("0.0.0.0", "::", "192.0.2.1"):
        assert not is_loopback(host)
        check_reach(host, TOKEN, "IT")
        with pytest.raises(UsageError, match="needs a token: set the environment variable IT"):
            check_reach(host, None, "IT")
