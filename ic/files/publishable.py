"""What may be published of a command, a path or any other text that a run has written down.

A model card, a conversion and a measurement leave the machine that wrote them. Where the files lay
there, who the user is and what the host is called are nobody's business, and a key that a command
holds even less.
"""

from __future__ import annotations

import re
import shlex
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

HIDDEN = "<hidden>"
# Hosts that mean the same to every reader.
_PUBLIC_HOSTS = ("huggingface.co", "hf.co", "github.com", "arxiv.org", "pypi.org")
_SECRET_NAME = re.compile(
    r"(^|[._-])(api_?key|access_?key|secret(_?key)?|(auth|access|api|hf|bearer)?_?token|"
    r"password|passwd|credentials?)$",
    re.IGNORECASE,
)
# Tokens of Hugging Face, OpenAI and those who write theirs alike, GitHub, GitLab, AWS, W&B.
_SECRET = re.compile(r"\b(?:hf_|sk-|gh[opsu]_|github_pat_|glpat-|AKIA|wandb_v1_)[A-Za-z0-9_-]{8,}")
_URL = re.compile(r"\b[a-zA-Z][a-zA-Z0-9+.-]*://[^\s'\"`,\]})>]+")
# An absolute path, with `~`, with `..` or with a drive, up to what may end one in a list or a text.
_PATH = re.compile(
    r"(?<![\w./\\~<-])(?:~[\w.-]*/|/(?=[^\s/])|(?:\./)?\.\./|[A-Za-z]:[\\/])[^\s'\"`,;\[\]{}()<>=|]*"
)
_LIST_MARKS = re.compile(r"([\[\]{},\"'])")


def publishable(value: Any) -> Any:
    """The same with every text in it changed as by `publishable_text`; keys of secrets lose theirs.

    Args:
        value: what JSON can hold.
    """
    if isinstance(value, dict):
        return {
            publishable_text(str(key)): HIDDEN
            if isinstance(item, str) and _SECRET_NAME.search(str(key))
            else publishable(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [publishable(item) for item in value]
    if isinstance(value, Path):
        return published_path(str(value))
    if not isinstance(value, str):
        return value
    is_path = value.startswith(("/", "~/")) and "\n" not in value
    return published_path(value) if is_path else publishable_text(value)


def publishable_text(text: str) -> str:
    """A text whose absolute paths are names, without hosts of URLs, secrets and this host's name.

    A path that holds a space cannot be told from two words in a text: where the text is a path,
    `published_path` takes it, and where it is a command, `published_command`.
    """
    text = _SECRET.sub(HIDDEN, text)
    urls: list[str] = []

    def keep(match: re.Match[str]) -> str:
        urls.append(_published_url(match[0]))
        return f"\0{len(urls) - 1}\0"

    text = _PATH.sub(lambda match: published_path(match[0]), _URL.sub(keep, text))
    for name in _host_names():
        text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", "<host>", text)
    return re.sub("\0(\\d+)\0", lambda match: urls[int(match[1])], text)


def published_path(path: str) -> str:
    """A relative path as it is; of any other its last part."""
    parts = re.split(r"[/\\]+", path.rstrip("/\\"))
    outside = path.startswith(("/", "~", "\\")) or ".." in parts or re.match(r"[A-Za-z]:", path)
    if not outside:
        return publishable_text(path)
    return publishable_text(parts[-1]) if parts[-1] not in ("", "..", "~") else "<folder>"


def published_command(command: str) -> str:
    """A command line with each argument `key=value` or `key=[value,value]` made publishable."""
    try:
        words = shlex.split(command)
    except ValueError:  # a quote that does not end
        return publishable_text(command)
    return " ".join(shlex.quote(_published_word(word)) for word in words)


def _published_word(word: str) -> str:
    name, equals, value = word.partition("=")
    if not equals:
        return published_path(word) if word.startswith(("/", "~", "..")) else publishable_text(word)
    if _SECRET_NAME.search(name):
        return f"{name}={HIDDEN}"
    if _URL.match(value):
        return f"{name}={publishable_text(value)}"
    parts = _LIST_MARKS.split(value)
    return f"{name}={''.join(_published_value(part) for part in parts)}"


def _published_value(part: str) -> str:
    bare = part.strip()
    if re.match(r"/|~|\.\.?/|[A-Za-z]:[\\/]", bare):
        return part.replace(bare, published_path(bare))
    return publishable_text(part)


def _published_url(url: str) -> str:
    try:
        parts = urlsplit(url)
    except ValueError:
        return HIDDEN
    host = (parts.hostname or "").removeprefix("www.")
    if parts.scheme == "file":
        return published_path(parts.path)
    if host in _PUBLIC_HOSTS:
        return f"{parts.scheme}://{host}{parts.path}"
    return f"{parts.scheme}://<host>"


def _host_names() -> list[str]:
    """This host's names, the longer first; a name that is a plain word could mean anything."""
    full = socket.gethostname()
    names = {full, full.partition(".")[0]}
    return sorted((name for name in names if re.search(r"[\d.-]", name)), key=len, reverse=True)
