"""A vendor's signed apt repository on this host, with packages that stand for the vendor's.

NVIDIA's and Grafana's servers are not reached from everywhere, and their packages want GPUs. What
is tested with these is what the roles do: keys, sources, pins, versions, order, services. The
packages have the names, versions and units of the real ones, and programs that say what the real
ones would.
"""

from __future__ import annotations

import functools
import hashlib
import http.server
import re
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Vendor:
    """Packages, signed by a key made here, below an address of this host.

    Attributes:
        url: of the repository, which is a flat one and has a suite "stable", too.
        key_url: of its public key.
        fingerprint: of its key.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "repository"
        self.folder.mkdir()
        self._home = folder / "gpg"
        self._home.mkdir(mode=0o700)
        self._gpg("--quick-gen-key", "Vendor <vendor@example.org>", "ed25519", "sign", "never")
        listed = self._gpg("--list-keys", "--with-colons")
        (self.fingerprint,) = re.findall(r"^fpr:+([0-9A-F]{40}):", listed, re.M)
        (self.folder / "key.asc").write_text(self._gpg("--armor", "--export"))
        self.url = self.key_url = ""

    def add(
        self, name: str, version: str, files: dict[str, str] | None = None, script: str = ""
    ) -> None:
        """A package; files that begin with `#!` are programs, `script` runs when it is installed."""
        tree = self.folder.parent / "tree" / f"{name}-{version}"
        (tree / "DEBIAN").mkdir(parents=True)
        (tree / "DEBIAN" / "control").write_text(
            f"Package: {name}\nVersion: {version}\nArchitecture: amd64\n"
            "Maintainer: Vendor <vendor@example.org>\nDescription: stands for the vendor's\n"
        )
        if script:
            (tree / "DEBIAN" / "postinst").write_text(f"#!/bin/sh\n{script}\n")
            (tree / "DEBIAN" / "postinst").chmod(0o755)
        for path, text in (files or {}).items():
            file = tree / path.lstrip("/")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
            file.chmod(0o755 if text.startswith("#!") else 0o644)
        package = self.folder / f"{name}_{version.split(':')[-1]}_amd64.deb"
        _run("dpkg-deb", "--root-owner-group", "-Znone", "--build", str(tree), str(package))

    def publish(self) -> None:
        """Write the index of all packages and sign it: of a flat one, and of stable main."""
        entries = []
        for package in sorted(self.folder.glob("*.deb")):
            content = package.read_bytes()
            control = _run("dpkg-deb", "--field", str(package))
            digest = hashlib.sha256(content).hexdigest()
            entries.append(
                f"{control.strip()}\nFilename: ./{package.name}\n"
                f"Size: {len(content)}\nSHA256: {digest}\n"
            )
        index = "\n".join(entries).encode()
        self._sign(self.folder, "Packages", index)
        self._sign(self.folder / "dists" / "stable", "main/binary-amd64/Packages", index)

    def _sign(self, folder: Path, name: str, index: bytes) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(index)
        (folder / "Release").write_text(
            "Origin: Vendor\nSuite: stable\nComponents: main\nArchitectures: amd64\n"
            f"SHA256:\n {hashlib.sha256(index).hexdigest()} {len(index)} {name}\n"
        )
        (folder / "InRelease").unlink(missing_ok=True)
        self._gpg("--clearsign", "-o", str(folder / "InRelease"), str(folder / "Release"))

    @contextmanager
    def served(self) -> Iterator[Vendor]:
        """Answer on a free port of loopback, which machines share with this host."""
        handler = functools.partial(_Silent, directory=str(self.folder))
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            thread = threading.Thread(target=server.serve_forever, daemon=True)
            thread.start()
            self.url = f"http://127.0.0.1:{server.server_port}/"
            self.key_url = f"{self.url}key.asc"
            try:
                yield self
            finally:
                server.shutdown()
                thread.join()

    def _gpg(self, *arguments: str) -> str:
        return _run(
            *("gpg", "--homedir", str(self._home), "--batch", "--pinentry-mode", "loopback"),
            *("--passphrase", "", *arguments),
        )


class _Silent(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


def service(program: str) -> str:
    """A unit that runs a program."""
    return f"[Service]\nExecStart={program}\n[Install]\nWantedBy=multi-user.target\n"


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout
