"""The images, really built and run: on stand-ins for their bases, without a daemon (make images)."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.deploy.containers import ROOT, Containers, bases, reason_not_to_run
from tests.serving.served import save_model

pytestmark = pytest.mark.images
TOKEN = "a-token-for-the-tests-0123456789"
UID = 10001
WRITABLE = {"/cache", "/workspace"}
# What no image needs at run time, by the names of the programs.
BUILD_TOOLS = ("make", "g++", "cc1plus", "nvcc", "pip", "pip3", "git", "curl", "wget")
# Packages enough for the command line, in place of gigabytes for GPUs.
FEW = ("hydra-core", "omegaconf", "antlr4-python3-runtime", "pyyaml", "packaging", "rich")
FEW += ("markdown-it-py", "mdurl", "pygments")


@pytest.fixture(scope="module")
def containers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Containers]:
    if (reason := reason_not_to_run()) is not None:
        pytest.skip(reason)
    here = Containers(tmp_path_factory.mktemp("images") / "containers")
    try:
        here.make_stand_in()
        yield here
    finally:
        here.remove()


@pytest.fixture(scope="module")
def serving(containers: Containers) -> str:
    labels = ("--build-arg", "VERSION=1.2.3", "--build-arg", "REVISION=abc")
    return containers.build("serving", "cpu", arguments=labels)


@pytest.fixture(scope="module")
def training(containers: Containers) -> str:
    return containers.build("training", "cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder and a token, which any user may read."""
    folder = tmp_path_factory.mktemp("model")
    save_model(folder / "model")
    (folder / "token").write_text(TOKEN + "\n")
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o444)
    return folder


def files(root: Path) -> Iterator[Path]:
    for path in root.rglob("*"):
        if not path.is_symlink() and not str(path.relative_to(root)).startswith(("proc", "sys")):
            yield path


def assert_nothing_is_wrong(root: Path, python: Path, compiler: bool) -> None:
    """No setuid, no file that the user could change, no build tool, no secret, no stale bytecode."""
    privileged, writable = [], []
    for path in files(root):
        found = path.stat()
        name = "/" + str(path.relative_to(root))
        if path.is_file() and found.st_mode & 0o6000:
            privileged.append(name)
        of_others = found.st_mode & 0o002 and not found.st_mode & 0o1000
        if found.st_uid == UID or found.st_gid == UID or of_others:
            writable.append(name)
    assert privileged == []
    assert {name for name in writable if not name.startswith("/dev/")} <= {
        *WRITABLE,
        "/workspace/runs",
    }
    for folder in ("usr/bin", "usr/local/bin", "opt/venv/bin", "bin"):
        there = [name for name in BUILD_TOOLS if (root / folder / name).exists()]
        assert there == [], folder
        assert (root / folder / "gcc").exists() <= compiler
    for left in ("tools", "source", "wheels", "requirements", "root/.cache", "root/.netrc"):
        assert not (root / left).exists(), left
    secret = re.compile(r"\.git/|/\.env$|/\.netrc$|/id_(rsa|ed25519)$|_token$")
    kept = [path for path in files(root / "opt") if path.is_file()]
    assert [path for path in kept if secret.search(str(path))] == []
    keys = [path for path in kept if path.suffix in (".pem", ".key")]
    assert [path for path in keys if b"PRIVATE KEY" in path.read_bytes()] == []
    # Python reads a .pyc only if it holds its source's time: else every start compiles anew.
    stale = 0
    sources = list((python / "ic").glob("*.py")) + list((python / "yaml").glob("*.py"))
    for source in sources:
        (compiled,) = (source.parent / "__pycache__").glob(f"{source.stem}.cpython-*.pyc")
        seconds = int.from_bytes(compiled.read_bytes()[8:12], "little")
        stale += seconds != int(source.stat().st_mtime)
    assert sources
    assert stale == 0


def assert_configured(config: dict[str, Any], target: str, device: str) -> None:
    assert config["User"] == f"{UID}:{UID}"
    assert config["Entrypoint"] == ["ic"]
    assert config["WorkingDir"] == "/workspace"
    labels = config["Labels"]
    assert labels["org.opencontainers.image.title"] == f"infinite-context {target}"
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert labels["infinite-context.device"] == device
    for name in ("version", "revision", "source", "description"):
        assert labels[f"org.opencontainers.image.{name}"]
    asked = config["Healthcheck"]["Test"]
    assert asked == ["CMD", "python", "-IS", "/usr/local/lib/healthcheck.py", target]
    assert set(config["Volumes"]) == {"/cache"} | (
        {"/workspace/runs"} if target == "training" else set()
    )
    environment = "\n".join(config["Env"])
    assert not re.search(r"(?i)token|secret|password", environment)


def site_packages(root: Path) -> Path:
    (found,) = (root / "opt/venv/lib").glob("python3.*/site-packages")
    return found


def test_serving_image(containers: Containers, serving: str) -> None:
    found = containers.inspect(serving)
    assert_configured(found["config"], "serving", "cpu")
    assert found["config"]["Cmd"] == ["serve", "source=/model", "host=0.0.0.0"]
    assert set(found["config"]["ExposedPorts"]) == {"8000/tcp"}
    labels = found["config"]["Labels"]
    assert labels["org.opencontainers.image.version"] == "1.2.3"
    assert labels["org.opencontainers.image.revision"] == "abc"
    with containers.mounted(serving) as root:
        assert_nothing_is_wrong(root, site_packages(root), compiler=False)
    print(f"\n{serving}: {image_size(containers, serving)}")


def image_size(containers: Containers, image: str) -> str:
    """As buildah writes it, such as 2.07 GB."""
    return str(json.loads(containers.buildah("images", "--json", image))[0]["size"])


def test_bill_of_materials(containers: Containers, serving: str) -> None:
    """The SBOM lists what is installed, in the versions of the list with checksums."""
    with containers.mounted(serving) as root:
        sbom = json.loads((root / "opt/venv/sbom.cdx.json").read_text())
    asked = "import importlib.metadata as m; print(*(f'{d.name}=={d.version}' for d in m.distributions()))"
    ran = containers.run(serving, "-c", asked, options=("--entrypoint", "python"))
    installed = {_normal(each) for each in ran.output.split()}
    assert sbom["bomFormat"] == "CycloneDX"
    assert {
        _normal(f"{each['name']}=={each['version']}") for each in sbom["components"]
    } == installed
    listed = (ROOT / "deploy/docker/requirements/cpu.txt").read_text()
    pins = {_normal(each) for each in re.findall(r"^([\w.-]+==[^ ]+)", listed, re.M)}
    (ours,) = installed - pins
    assert ours.startswith("infinite-context==")
    assert pins <= installed


def _normal(pin: str) -> str:
    name, _, version = pin.partition("==")
    return f"{re.sub(r'[-_.]+', '-', name).lower()}=={version}"


@contextmanager
def server(containers: Containers, image: str, model: Path) -> Iterator[tuple[str, int]]:
    """A container that serves -> its name and port; it must end in order."""
    name = "server"
    mounts = ("-v", f"{model}/model:/model:ro", "-v", f"{model}/token:/run/secrets/serve_token:ro")
    # host= and port= are the image's; here all containers share the machine's network.
    arguments = ("serve", "source=/model", "host=127.0.0.1", "port=0", "model_name=tiny")
    arguments += ("token_file=/run/secrets/serve_token", "engine.cache_tokens=4096")
    command = containers.command(image, *arguments, options=("--name", name, *mounts))
    process = subprocess.Popen(
        command,
        env=containers.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        lines = []
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if match := re.search(r"serving tiny at http://127\.0\.0\.1:(\d+)", line):
                break
        else:
            raise AssertionError("".join(lines))
        yield name, int(match[1])
        process.send_signal(signal.SIGTERM)
        process.stdout.read()
        assert process.wait() == 0
    finally:
        process.kill()
        process.wait()


def test_serving(containers: Containers, serving: str, model: Path) -> None:
    """Nobody's user, a root that cannot be written: health, 401 without the token, an answer."""
    with server(containers, serving, model) as (name, port):
        url = f"http://127.0.0.1:{port}"
        with httpx2.Client(base_url=url, timeout=120, trust_env=False) as http:
            assert http.get("/health").status_code == 200
            asked = {"model": "tiny", "max_tokens": 4, "temperature": 0}
            asked |= {"messages": [{"role": "user", "content": "hi"}]}
            refused = http.post("/v1/chat/completions", json=asked)
            assert refused.status_code == 401
            assert refused.json()["error"]["code"] == "invalid_api_key"
            bearer = {"Authorization": f"Bearer {TOKEN}"}
            answer = http.post("/v1/chat/completions", json=asked, headers=bearer)
            assert answer.status_code == 200, answer.text
            assert answer.json()["usage"]["completion_tokens"] == 4
            metrics = http.get("/metrics", headers=bearer)
            assert re.search(r"^ic:prompt_tokens_total\S* [1-9]", metrics.text, re.M)
        status = containers.execute(name, "cat", "/proc/1/status").output
        assert re.search(rf"^Uid:\s+{UID}\s+{UID}\s+{UID}\s+{UID}$", status, re.M)
        assert re.search(r"^CapEff:\s+0+$", status, re.M)
        assert re.search(r"^NoNewPrivs:\s+1$", status, re.M)
        for path in ("/x", "/opt/venv/x", "/usr/local/lib/x", "/workspace/x"):
            refused_write = containers.execute(name, "touch", path)
            assert "Read-only file system" in refused_write.error, path
        assert containers.execute(name, "touch", "/cache/x", "/tmp/x").code == 0
        check = ("python", "-IS", "/usr/local/lib/healthcheck.py", "serving")
        health = f"IC_HEALTH_URL={url}/health"
        assert containers.execute(name, "env", health, *check).output == "healthy\n"
        closed = containers.execute(name, "env", "IC_HEALTH_URL=http://127.0.0.1:1/health", *check)
        assert closed.code == 1
        assert "http://127.0.0.1:1/health: " in closed.output


def test_without_a_token_the_image_serves_nobody(
    containers: Containers, serving: str, model: Path
) -> None:
    """The image's own command listens on every address, which needs a token."""
    ended = containers.run(serving, options=("-v", f"{model}/model:/model:ro"))
    assert ended.code == 2
    assert "IC_SERVE_TOKEN" in ended.error.splitlines()[-1]


def test_training(containers: Containers, training: str, tmp_path: Path) -> None:
    """A run in the image leaves its files in the volume, and the check of health sees them."""
    assert_configured(containers.inspect(training)["config"], "training", "cpu")
    with containers.mounted(training) as root:
        assert_nothing_is_wrong(root, site_packages(root), compiler=False)
    runs = tmp_path / "runs"
    runs.mkdir()
    shutil.chown(runs, UID, UID)
    volume = ("-v", f"{runs}:/workspace/runs", "--env", "OMP_NUM_THREADS=1")
    check = ("-IS", "/usr/local/lib/healthcheck.py", "training")
    asked = (*volume, "--entrypoint", "python")
    before = containers.run(training, *check, options=asked)
    assert (before.code, before.output) == (1, "/workspace/runs holds no file\n")
    fit = ("fit", "experiment=mla_tiny", "debug=default", "trainer.accelerator=cpu")
    ended = containers.run(training, *fit, options=volume)
    assert ended.code == 0, ended.error
    (results,) = runs.rglob("results.json")
    assert json.loads(results.read_text())["rows"]
    assert results.stat().st_uid == UID
    assert containers.run(training, *check, options=asked).output == "healthy\n"
    late = time.time() - 3600
    for path in runs.rglob("*"):
        if path.is_file():
            os.utime(path, (late, late))
    after = containers.run(training, *check, options=asked)
    assert after.code == 1
    assert re.search(r"nothing was written for 36\d\d s, limit 1800 s", after.output)
    print(f"\n{training}: {image_size(containers, training)}")


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The build's context with short lists in place of those for GPUs."""
    context = tmp_path_factory.mktemp("few")
    listed = ("ls-files", "-z", "--cached", "--others", "--exclude-standard")
    names = subprocess.run(["git", *listed], cwd=ROOT, check=True, capture_output=True, text=True)
    for name in names.stdout.split("\0"):
        if name and (ROOT / name).exists() and not name.startswith(("tests/", "docs/")):
            (context / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, context / name, follow_symlinks=False)
    requirements = context / "deploy/docker/requirements"
    pins = re.split(r"\n(?=\S)", (requirements / "cpu.txt").read_text())
    short = "\n".join(pin for pin in pins if pin.partition("==")[0] in FEW) + "\n"
    assert short.count("==") == len(FEW)
    for name in ("training-gpu.txt", "serving-gpu.txt"):
        (requirements / name).write_text(short)
    return context


@pytest.mark.parametrize("target", ["training", "serving"])
def test_images_for_gpus(containers: Containers, few: Path, target: str) -> None:
    """Their stages and settings; what they install needs the real bases and gigabytes."""
    image = containers.build(target, "gpu", few)
    config = containers.inspect(image)["config"]
    assert_configured(config, target, "gpu")
    assert "NVIDIA_DRIVER_CAPABILITIES=compute,utility" in config["Env"]
    with containers.mounted(image) as root:
        assert_nothing_is_wrong(root, site_packages(root), compiler=True)
        (header,) = (root / "usr/include").glob("python3.*/Python.h")
        assert header.is_file()  # Triton's launcher includes it
    # No model is mounted, which the command line says by itself.
    ended = containers.run(image, *(("--help",) if target == "training" else ()))
    assert ended.code == (0 if target == "training" else 2), ended.error
    build = "echo 'int main(void) {return 0;}' > /tmp/a.c && gcc /tmp/a.c -o /tmp/a"
    assert containers.run(image, "-c", build, options=("--entrypoint", "sh")).code == 0


def test_nothing_but_the_sources_is_sent_to_a_build(containers: Containers, tmp_path: Path) -> None:
    """A run, a key and the history beside the sources stay out of the context."""
    (tmp_path / "Dockerfile").write_text("FROM localhost/stand-in\nCOPY . /context\n")
    context = tmp_path / "context"
    for name in (
        "runs/a/model.safetensors",
        "secrets/token",
        ".git/config",
        "conf/local/a.yaml",
        "ic/x.py",
        "ic/__pycache__/x.pyc",
        "conf/a.yaml",
        "README.md",
        "docs/a.md",
    ):
        (context / name).parent.mkdir(parents=True, exist_ok=True)
        (context / name).write_text("x")
    shutil.copy(ROOT / ".dockerignore", context)
    containers.buildah(
        "bud",
        "-q",
        "--pull-never",
        "-t",
        "localhost/context",
        "-f",
        str(tmp_path / "Dockerfile"),
        str(context),
    )
    with containers.mounted("localhost/context") as root:
        sent = {
            str(path.relative_to(root / "context"))
            for path in files(root / "context")
            if path.is_file()
        }
    assert sent == {"ic/x.py", "conf/a.yaml", "README.md"}


def test_bases_are_pinned_by_digest() -> None:
    assert len(bases()) == 2
    for base in bases():
        assert re.fullmatch(r"docker\.io/[\w/]+:[\w.-]+@sha256:[0-9a-f]{64}", base)
