"""The model registry: names, versions and aliases on an MLflow server.

    models:/ic-1b@champion      the version that an alias points to
    models:/ic-1b/3             a version

A version holds a model as `export` writes it with its card, `MLmodel` with its signature,
`evaluation/` with what was measured of it, and `registered.sha256`. The digest of that file is a
tag of the version, so that nobody else's files can take its place. A version that lacks any of this
is unsigned, and is not loaded. Imports no MLflow at its top: help and refusals come at once.
"""

from __future__ import annotations

import difflib
import fcntl
import functools
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ic.errors import UsageError, one_line
from ic.files.cache_folder import AUTO, cache_folder
from ic.tracking.server import VARIABLE, fail_soon, server_uri

SCHEME = "models:/"
CARD, SIGNATURE, CHECKSUMS, EVALUATION = "README.md", "MLmodel", "registered.sha256", "evaluation"
CANDIDATE, CHAMPION = "candidate", "champion"
DIGEST_TAG = "ic.sha256"  # of the file of checksums
REPLACED_TAG = "ic.replaced"  # the version that had the alias before, for the way back
_FORM = re.compile(r"models:/(?P<name>[^/@:]+)(?:@(?P<alias>[\w.-]+)|/(?P<version>\d+))")


@dataclass(frozen=True)
class Version:
    """A version of a registered model.

    Attributes:
        number: from 1.
        digest: of its file of checksums; None if the version is unsigned.
        files: address of its files.
    """

    name: str
    number: int
    digest: str | None
    files: str
    tags: dict[str, str]

    def __str__(self) -> str:
        return f"{SCHEME}{self.name}/{self.number}"


def is_registered(given: str | Path) -> bool:
    """Whether a source is meant to come from the registry."""
    return str(given).startswith("models:")


def check_name(key: str, name: str) -> None:
    """Raises:
    UsageError: MLflow takes no such name.
    """
    if not re.fullmatch(r"[\w.-]{1,200}", name):
        raise UsageError(f"{key}={name!r}: give letters, digits and any of . _ -")


class Registry:
    """A server's registry.

    Raises (each method):
        UsageError: the server does not answer, or has nothing of the kind; one line that says what.
    """

    def __init__(self, key: str, uri: str | None) -> None:
        self.uri = server_uri(key, uri)
        from mlflow import MlflowClient

        fail_soon()
        self.client = MlflowClient(self.uri, self.uri)

    def find(self, name: str, alias: str | None = None, number: int | None = None) -> Version:
        """The version of an alias or a number."""
        from mlflow.exceptions import MlflowException

        try:
            if alias is not None:
                found = self.client.get_model_version_by_alias(name, alias)
            else:
                found = self.client.get_model_version(name, str(number))
        except MlflowException as error:
            raise self._missing(error, name, alias, number) from error
        files = self._asked(lambda: self.client.get_model_version_download_uri(name, found.version))
        tags = dict(found.tags)
        return Version(name, int(found.version), tags.get(DIGEST_TAG), files, tags)

    def aliases(self, name: str) -> dict[str, int]:
        """Aliases of a model, with the versions that they point to."""
        from mlflow.exceptions import MlflowException

        try:
            found = self.client.get_registered_model(name)
        except MlflowException as error:
            raise self._missing(error, name, None, None) from error
        return {alias: int(number) for alias, number in found.aliases.items()}

    def point(self, alias: str, version: Version, replaced: int | None = None) -> None:
        """Have an alias point to a version; what it pointed to before is noted, if given."""
        name, number = version.name, str(version.number)
        if replaced is not None:
            self._asked(
                lambda: self.client.set_model_version_tag(name, number, REPLACED_TAG, str(replaced))
            )
        self._asked(lambda: self.client.set_registered_model_alias(name, alias, number))

    def new_run(self, experiment: str, name: str) -> str:
        """A finished run without metrics, for files of a model that was not trained there."""

        def make() -> str:
            found = self.client.get_experiment_by_name(experiment)
            where = found.experiment_id if found else self.client.create_experiment(experiment)
            run = self.client.create_run(where, run_name=name)
            self.client.set_terminated(run.info.run_id)
            return str(run.info.run_id)

        return str(self._asked(make))

    def upload(self, run_id: str, file: Path, inside: str) -> None:
        """One file, into a folder of a run's files."""
        try:
            self.client.log_artifact(run_id, str(file), inside)
        except Exception as error:  # MLflow's or requests'
            raise self._silent(error) from error

    def create(self, name: str, run_id: str, inside: str, tags: dict[str, str]) -> Version:
        """A new version from files of a run."""
        from mlflow.exceptions import MlflowException

        try:
            self.client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise self._silent(error) from error
        run = self._asked(lambda: self.client.get_run(run_id))
        source = f"{run.info.artifact_uri}/{inside}"
        made = self._asked(
            lambda: self.client.create_model_version(name, source, run_id, tags=tags)
        )
        return self.find(name, number=int(made.version))

    def download(self, version: Version, only: str = "") -> Path:
        """The files of a version, or those of a folder in it, once they are known to be its own.

        They are kept by digest in ~/.cache/infinite-context/models.

        Raises:
            UsageError: as above; the version is unsigned, or a file is not the one registered.
        """
        if version.digest is None:
            raise _unsigned(version, f"it has no tag {DIGEST_TAG}")
        base = cache_folder(AUTO, "models")
        assert base is not None
        folder = base / version.digest[:16] / f"{version.name}-v{version.number}"
        with _alone(folder):
            if not (folder / CHECKSUMS).is_file():
                self._fetch(version, CHECKSUMS, folder)
            if _sha256(folder / CHECKSUMS) != version.digest:
                (folder / CHECKSUMS).unlink()
                raise UsageError(f"{version}: its {CHECKSUMS} is not the one that was registered")
            for name, digest in _listed(folder, version, only):
                if (folder / name).is_file():
                    continue
                self._fetch(version, name, folder)
                if _sha256(folder / name) != digest:
                    (folder / name).unlink()
                    raise UsageError(
                        f"{version}: {name} differs from what was registered; it was damaged or "
                        "changed on the server"
                    )
        return folder

    def _fetch(self, version: Version, name: str, folder: Path) -> None:
        """One file, under a temporary name until it is whole."""
        from mlflow.artifacts import download_artifacts

        partial = folder / f".{os.getpid()}.partial"
        try:
            partial.mkdir(parents=True, exist_ok=True)
            found = download_artifacts(
                f"{version.files.rstrip('/')}/{name}", dst_path=str(partial), tracking_uri=self.uri
            )
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(found, folder / name)
        except Exception as error:  # MLflow's, requests', the disk's
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise UsageError(f"{version}: {name} cannot be had: {one_line(error)}") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _asked(self, ask: Callable[[], Any]) -> Any:
        from mlflow.exceptions import MlflowException

        try:
            return ask()
        except MlflowException as error:
            raise self._silent(error) from error

    def _silent(self, error: Exception) -> UsageError:
        return UsageError(
            f"the registry at {self.uri} does not do it: {one_line(error)}; is the server up, and "
            f"is {VARIABLE} its address?"
        )

    def _missing(self, error: Any, name: str, alias: str | None, number: int | None) -> UsageError:
        """What is not there, and what is."""
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return self._silent(error)
        models = self._asked(lambda: self.client.search_registered_models(max_results=100))
        known = {model.name: model for model in models}
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(known) or 'none'}"
            return UsageError(f"the registry at {self.uri} has no model {name!r}; {hint}")
        if alias is None:
            return UsageError(f"{SCHEME}{name}/{number}: there is no such version")
        aliases = ", ".join(f"{each} ({v})" for each, v in known[name].aliases.items())
        return UsageError(
            f"{SCHEME}{name}@{alias}: the model has no alias {alias!r}; it has {aliases or 'none'}"
        )


@functools.cache
def registered_folder(given: str) -> Path:
    """The folder of a registered model, downloaded if need be; in one process always the same one,
    wherever the alias points to meanwhile.

    Raises:
        UsageError: no such form, model, alias or version; an unsigned version; no registry.
    """
    parts = _FORM.fullmatch(given)
    if parts is None:
        raise UsageError(
            f"{given}: write models:/NAME@ALIAS or models:/NAME/VERSION, such as "
            "models:/ic-1b@champion"
        )
    number = parts["version"]
    registry = Registry(given, None)
    version = registry.find(parts["name"], parts["alias"], int(number) if number else None)
    return registry.download(version)


def digest_of(folder: Path) -> str:
    """What identifies the files of a folder: the digest of its file of checksums."""
    return _sha256(folder / CHECKSUMS)


def write_listing(folder: Path) -> None:
    """List every file of a folder, and of folders in it, with its digest."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != CHECKSUMS)
    lines = [f"{_sha256(file)}  {file.relative_to(folder).as_posix()}\n" for file in files]
    (folder / CHECKSUMS).write_text("".join(lines), encoding="utf-8")


def _listed(folder: Path, version: Version, only: str) -> Iterator[tuple[str, str]]:
    lines = [line.partition("  ") for line in (folder / CHECKSUMS).read_text().splitlines()]
    names = {name for _, _, name in lines}
    if lacking := [needed for needed in (CARD, SIGNATURE) if needed not in names]:
        raise _unsigned(version, f"it has no {' and no '.join(lacking)}")
    for digest, _, name in lines:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise UsageError(f"{version}: {CHECKSUMS} names {name!r}, which lies elsewhere")
        if name.startswith(only):
            yield name, digest


def _unsigned(version: Version, why: str) -> UsageError:
    return UsageError(
        f"{version} is unsigned: {why}, so nobody can say what it is; register it with "
        "python -m ic register"
    )


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time downloads into a folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
