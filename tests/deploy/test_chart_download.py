"""The init container's script, against a real server."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from tests.deploy.charts import SERVING, documents, one

SCRIPT = SERVING / "files" / "fetch_model.py"


class Quiet(SimpleHTTPRequestHandler):
    asked: ClassVar[list[str]] = []

    def log_message(self, *_: object) -> None:
        self.asked.append(self.path)


def archive(folder: Path, name: str, members: dict[str, bytes]) -> str:
    """Write a tar -> its digest."""
    with tarfile.open(folder / name, "w") as tar:
        for path, content in members.items():
            member = tarfile.TarInfo(path)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return hashlib.sha256((folder / name).read_bytes()).hexdigest()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder, and the address at which it is served."""
    folder = tmp_path / "site"
    folder.mkdir()
    Quiet.asked.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield folder, f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def fetch(url: str, sha256: str, folder: Path) -> subprocess.CompletedProcess[str]:
    arguments = [f"--url={url}", f"--sha256={sha256}", f"--folder={folder}"]
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={"no_proxy": "*"})


def test_it_is_fetched_once(site: tuple[Path, str], tmp_path: Path) -> None:
    folder, url = site
    digest = archive(folder, "a.tar", {"mla/config.json": b"{}", "mla/model.safetensors": b"x" * 9})
    models = tmp_path / "models"
    models.mkdir()
    (models / "left-over").write_text("of a pod that was killed amid it")
    first = fetch(f"{url}/a.tar", digest, models)
    assert first.returncode == 0, first.stderr
    found = sorted(str(each.relative_to(models)) for each in models.rglob("*") if each.is_file())
    assert found == [".fetched", "mla/config.json", "mla/model.safetensors"]
    again = fetch(f"{url}/a.tar", digest, models)
    assert (again.returncode, len(Quiet.asked)) == (0, 1)
    other = archive(folder, "a.tar", {"new/config.json": b"{}"})
    assert fetch(f"{url}/a.tar", other, models).returncode == 0
    assert not (models / "mla").exists()


@pytest.mark.parametrize(
    ("name", "digest", "told"),
    [
        ("a.tar", "0" * 64, "has the digest"),
        ("a.tar", "0123", "--sha256=0123: give the 64 hexadecimal digits"),
        ("b.tar", "0" * 64, "HTTP Error 404"),
    ],
)
def test_what_is_not_meant_is_not_unpacked(
    site: tuple[Path, str], tmp_path: Path, name: str, digest: str, told: str
) -> None:
    folder, url = site
    archive(folder, "a.tar", {"mla/config.json": b"{}"})
    models = tmp_path / "models"
    models.mkdir()
    found = fetch(f"{url}/{name}", digest, models)
    assert found.returncode == 1
    assert told in found.stderr
    assert found.stderr.count("\n") == 1
    assert list(models.iterdir()) == []


@pytest.mark.parametrize("path", ["../out", "/tmp/out"])
def test_nothing_leaves_the_folder(site: tuple[Path, str], tmp_path: Path, path: str) -> None:
    folder, url = site
    digest = archive(folder, "a.tar", {path: b"x"})
    models = tmp_path / "models"
    models.mkdir()
    found = fetch(f"{url}/a.tar", digest, models)
    # An absolute path is taken as one below the folder, as `tar` does.
    assert found.returncode == (0 if path.startswith("/") else 1)
    assert not (tmp_path / "out").exists()
    assert not (models / ".fetched").exists() or (models / "tmp" / "out").is_file()


@pytest.mark.chart
def test_the_pod_runs_this_script() -> None:
    found = documents("cpu-engine")
    pod = one(found, "Deployment")["spec"]["template"]["spec"]
    (init,) = pod["initContainers"]
    (script,) = one(found, "ConfigMap")["data"].items()
    assert script == ("fetch_model.py", f"\n{SCRIPT.read_text()}".lstrip("\n"))
    assert init["command"][1] == f"/etc/infinite-context/{script[0]}"
    mounted = {each["name"]: each["mountPath"] for each in init["volumeMounts"]}
    assert mounted["models"] == "/models"
    assert "--folder=/models" in init["args"]
    assert next(each for each in pod["volumes"] if each["name"] == "models") == {
        "name": "models",
        "emptyDir": {"sizeLimit": "10Gi"},
    }
