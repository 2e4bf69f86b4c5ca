"""Fetches a model: a tar archive of a known digest, unpacked into a folder. Standard library only.

Nothing is unpacked before the whole archive has the digest that was asked for, and a folder that
already holds it is left as it is.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

PIECE = 2**20  # bytes
TIMEOUT_S = 60  # without a byte


def fetch(url: str, sha256: str, folder: Path) -> str:
    """Fill the folder -> a line that says what was done.

    Raises:
        ValueError: the digest is none, or the archive has another.
        OSError: the archive cannot be fetched or written.
        tarfile.TarError: it is no archive, or holds what does not belong into the folder.
    """
    if not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise ValueError(f"--sha256={sha256}: give the 64 hexadecimal digits of sha256sum")
    mark = folder / ".fetched"
    if mark.is_file() and mark.read_text() == sha256:
        return f"{folder} holds the archive {sha256[:12]}"
    for old in folder.iterdir():
        shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
    digest, size = hashlib.sha256(), 0
    with tempfile.TemporaryFile(dir=folder) as archive:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
            while piece := answer.read(PIECE):
                digest.update(piece)
                size += archive.write(piece)
        if digest.hexdigest() != sha256:
            raise ValueError(f"{url} has the digest {digest.hexdigest()}, not {sha256}")
        archive.seek(0)
        with tarfile.open(fileobj=archive) as tar:
            tar.extractall(folder, filter="data")
    mark.write_text(sha256)
    return f"{url}: {size:,} bytes, digest {sha256[:12]}, unpacked into {folder}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", required=True)
    parser.add_argument("--sha256", required=True)
    parser.add_argument("--folder", required=True, type=Path)
    asked = parser.parse_args()
    try:
        print(fetch(asked.url, asked.sha256, asked.folder), flush=True)
    except (OSError, ValueError, tarfile.TarError, urllib.error.URLError) as error:
        print(f"{asked.url} cannot be used: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
