"""Images built and run without a daemon: buildah and podman on a storage of their own.

The registries of the base images are not reached from everywhere, so Debian stands in for them: its
packages have the same names. What the Dockerfile does on top of the bases is what is tested.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "deploy/docker/Dockerfile"
STAND_IN = "localhost/stand-in"
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
PROGRAMS = ("buildah", "podman", "crun", "mmdebstrap")
# Of this machine's environment: how packages are reached.
_PASSED_ON = ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "HTTPS_PROXY", "https_proxy", "NO_PROXY")
# Where systemd is not the first process, cgroups are in a form that podman refuses.
_OWN_CGROUPS = (
    'umount -R /sys/fs/cgroup 2>/dev/null; mount -t cgroup2 cgroup2 /sys/fs/cgroup && exec "$@"'
)
# As a cautious host would run them: nothing but the volumes can be written, nothing is privileged.
LOCKED = ("--read-only", "--read-only-tmpfs=false", "--tmpfs", "/tmp", "--cap-drop", "all")
LOCKED += ("--security-opt", "no-new-privileges")


def reason_not_to_run() -> str | None:
    """Why images cannot be built here, or None."""
    if os.geteuid() != 0:
        return "images are built by root here"
    if missing := [name for name in PROGRAMS if shutil.which(name) is None]:
        return f"{', '.join(missing)} not installed (.ci/packages buildah podman crun mmdebstrap)"
    return None


def bases(dockerfile: Path = DOCKERFILE) -> list[str]:
    """The images that a Dockerfile begins from, without its own stages."""
    found, stages = [], set()
    for line in dockerfile.read_text().splitlines():
        if match := re.match(r"FROM (\S+)(?: AS (\S+))?", line):
            if match[1] not in stages and "${" not in match[1]:
                found.append(match[1])
            stages.add(match[2])
    return found


@dataclass(frozen=True)
class Ended:
    """A container that has ended."""

    code: int
    output: str
    error: str


class Containers:
    """Images and containers below one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        (folder / "storage.conf").write_text(
            f'[storage]\ndriver = "overlay"\ngraphroot = "{folder}/storage"\n'
            f'runroot = "{folder}/run"\n'
        )
        (folder / "containers.conf").write_text("[containers]\n[engine]\n")
        (folder / "tmp").mkdir()
        self.environment = {
            **os.environ,
            "CONTAINERS_STORAGE_CONF": str(folder / "storage.conf"),
            "CONTAINERS_CONF": str(folder / "containers.conf"),
            "BUILDAH_ISOLATION": "chroot",
            "TMPDIR": str(folder / "tmp"),
        }

    def buildah(self, *arguments: str) -> str:
        """What it printed; its errors are shown by pytest."""
        done = subprocess.run(
            ["buildah", *arguments], env=self.environment, stdout=subprocess.PIPE, text=True
        )
        assert done.returncode == 0, f"buildah {arguments[0]}: {done.stdout[-4000:]}"
        return done.stdout.strip()

    def podman(self, *arguments: str) -> list[str]:
        """The command of a podman that works without systemd."""
        own = ("unshare", "-m", "--propagation", "private", "bash", "-c", _OWN_CGROUPS, "_")
        podman = ("podman", "--cgroup-manager", "cgroupfs", "--events-backend", "file")
        return [*own, *podman, "--runtime", "crun", *arguments]

    def make_stand_in(self) -> None:
        """Debian's smallest system, with the certificates of this machine."""
        tar = self.folder / "base.tar"
        what = ("--quiet", "--variant=minbase", "--include=ca-certificates", "bookworm")
        here = {**self.environment, "TMPDIR": str(self.folder)}
        subprocess.run(["mmdebstrap", *what, str(tar)], check=True, env=here)
        container = self.buildah("from", "scratch")
        self.buildah("add", "-q", container, str(tar), "/")
        self.buildah("copy", "-q", container, str(CERTIFICATES), str(CERTIFICATES))
        settings = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
        settings["PIP_CERT"] = str(CERTIFICATES)
        settings |= {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        for name, value in settings.items():
            self.buildah("config", "--env", f"{name}={value}", container)
        self.buildah("commit", "-q", container, STAND_IN)
        self.buildah("rm", container)
        tar.unlink()

    def build(
        self, target: str, device: str, context: Path = ROOT, arguments: Sequence[str] = ()
    ) -> str:
        """Build a target of the Dockerfile on the stand-in -> the image's name."""
        name = f"localhost/{target}-{device}"
        command = [
            "bud",
            "--layers",
            "--force-rm",
            "--pull-never",
            "--network",
            "host",
            "--format",
            "docker",
        ]
        for base in bases():
            command += ["--build-context", f"{base}=container-image://{STAND_IN}"]
        # PyTorch's builds for CPUs may lie on this machine.
        wheels = os.environ.get("PIP_FIND_LINKS", "")
        if Path(wheels).is_dir():
            command += ["--volume", f"{wheels}:{wheels}:ro"]
        if wheels:
            command += ["--build-arg", f"TORCH_WHEELS={wheels}"]
        command += ["--build-arg", f"DEVICE={device}", *arguments, "--target", target]
        self.buildah(
            *command, "-t", name, "-f", str(context / "deploy/docker/Dockerfile"), str(context)
        )
        return name

    def inspect(self, image: str) -> dict[str, Any]:
        """The image's configuration as Docker has it."""
        found: dict[str, Any] = json.loads(self.buildah("inspect", "--type", "image", image))
        return found["Docker"]

    @contextmanager
    def mounted(self, image: str) -> Any:
        """The image's files, at a path of this machine."""
        container = self.buildah("from", "--pull-never", image)
        try:
            yield Path(self.buildah("mount", container))
        finally:
            self.buildah("rm", container)

    def command(self, image: str, *arguments: str, options: Sequence[str] = ()) -> list[str]:
        """The command that runs an image, locked."""
        # A sandbox may not raise limits, and health is asked by the tests: there is no systemd.
        here = ("--cgroups", "disabled", "--network", "host", "--no-healthcheck")
        here += ("--ulimit", "nofile=1024:2048", "--ulimit", "nproc=4096:4096")
        return self.podman("run", "--rm", *here, *LOCKED, *options, image, *arguments)

    def run(self, image: str, *arguments: str, options: Sequence[str] = ()) -> Ended:
        """Run an image to its end."""
        done = subprocess.run(
            self.command(image, *arguments, options=options),
            env=self.environment,
            capture_output=True,
            text=True,
        )
        return Ended(done.returncode, done.stdout, done.stderr)

    def execute(self, container: str, *arguments: str) -> Ended:
        """Run a command in a container that runs."""
        done = subprocess.run(
            self.podman("exec", container, *arguments),
            env=self.environment,
            capture_output=True,
            text=True,
        )
        return Ended(done.returncode, done.stdout, done.stderr)

    def remove(self) -> None:
        """Stop what runs, and give the disk back."""
        subprocess.run(
            self.podman("rm", "--all", "--force", "--time", "0"),
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        subprocess.run(["buildah", "rm", "--all"], env=self.environment, stdout=subprocess.DEVNULL)
        # What is still mounted below would be emptied, not unmounted.
        for line in reversed(Path("/proc/self/mounts").read_text().splitlines()):
            if line.split()[1].startswith(str(self.folder)):
                subprocess.run(["umount", "-l", line.split()[1]])
        shutil.rmtree(self.folder)
