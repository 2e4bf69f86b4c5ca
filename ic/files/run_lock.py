"""One process at a time trains in a run's folder.

    .lock    {"host": ..., "pid": ..., "started": ..., "job_id": ..., ...}; gone once the run ends

The file is made under a temporary name and linked to its own, which one process alone can do, over
NFS too. Its holder touches it every `BEAT_S`. A holder is gone if its process is (on the same
host), if SLURM has started its job again, or if the file was not touched for `STALE_S`; its lock is
then replaced. Time is the file server's, since the clocks of hosts differ.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from ic.files.atomic_write import named
from ic.files.run_folder import RunFolder

BEAT_S = 20.0
STALE_S = 300.0  # longer than an NFS client believes old attributes, and than a server fails over
_LOST_EXIT_CODE = 2


class RunInUseError(ValueError):
    """Another process trains in the run's folder."""


@dataclass(frozen=True)
class Holder:
    """The process that trains in a folder.

    Attributes:
        host: its host's name.
        boot: the host's boot and the process's namespace of process ids: what `pid` refers to;
            empty where the system has no /proc to tell.
        pid: its process id.
        started: when it started, in ticks since the boot, so that a later process of the same id
            is not taken for it.
        job_id, restarts: its SLURM job, and how often SLURM had started the job again.
        since: the wall-clock time at which it took the folder, for people.
    """

    host: str
    boot: str
    pid: int
    started: int | None
    job_id: str | None
    restarts: int
    since: str

    @classmethod
    def me(cls) -> Holder:
        pid, environment = os.getpid(), os.environ
        return cls(
            host=socket.gethostname(),
            boot=_boot(),
            pid=pid,
            started=_start_of(pid),
            job_id=environment.get("SLURM_JOB_ID"),
            restarts=int(environment.get("SLURM_RESTART_COUNT") or 0),
            since=time.strftime("%Y-%m-%d %H:%M:%S"),
        )

    def is_gone(self, me: Holder, silent_s: float) -> bool:
        """Whether its process has ended, as far as can be known from here.

        Args:
            silent_s: seconds since it last touched its lock.
        """
        if me.boot and (self.host, self.boot) == (me.host, me.boot):
            return _start_of(self.pid) is None or _start_of(self.pid) != self.started
        if self.job_id is not None and self.job_id == me.job_id and self.restarts < me.restarts:
            return True
        return silent_s > STALE_S

    def __str__(self) -> str:
        job = f" of job {self.job_id}" if self.job_id else ""
        return f"process {self.pid}{job} on {self.host}, since {self.since}"


@contextmanager
def locked(run: RunFolder) -> Iterator[None]:
    """Hold a run's folder, which is made if need be; left empty, it is removed again.

    Raises:
        RunInUseError: another process trains in it.
    """
    made = _make_folders(run.path)
    try:
        lock = _Lock(run.lock, _acquire(run))
        try:
            yield
        finally:
            lock.release()
    finally:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()


class _Lock:
    """A lock that this process holds: touched until it is released."""

    def __init__(self, file: Path, holder: Holder) -> None:
        self.file = file
        self._holder = holder
        self._ended = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="run lock", daemon=True)
        self._heart.start()

    def release(self) -> None:
        self._ended.set()
        self._heart.join()
        if self._is_mine():
            self.file.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_S):
            with contextlib.suppress(OSError):  # a file server that is away for a moment
                if self._is_mine():
                    os.utime(self.file)
                elif self.file.exists():
                    self._end_at_once()

    def _is_mine(self) -> bool:
        try:
            return _parse(self.file.read_text()) == self._holder
        except OSError:
            return False

    def _end_at_once(self) -> None:
        # This process stood still for so long that another one took it for dead and goes on from
        # its last checkpoint. Whatever it still wrote would be mixed with the other's files.
        print(
            f"ic: {self.file.parent} was taken over by another process while this one did not "
            "answer; it ends at once, so that it overwrites nothing",
            file=sys.stderr,
            flush=True,
        )
        os._exit(_LOST_EXIT_CODE)


def _acquire(run: RunFolder) -> Holder:
    me = Holder.me()
    temporary = run.lock.with_name(f".{run.lock.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(asdict(me)))
        while not _link(temporary, run.lock):
            if _replace_if_gone(run, temporary, me):
                break
        return me
    except OSError as error:
        raise named(error, run.lock) from None
    finally:
        temporary.unlink(missing_ok=True)


def _link(temporary: Path, lock: Path) -> bool:
    """Give the file the lock's name; False if there is a lock."""
    try:
        os.link(temporary, lock)
    except FileExistsError:
        return False
    except OSError:  # no hard links here: as good, but for a crash between the two calls
        try:
            file = lock.open("x")
        except FileExistsError:
            return False
        try:
            with file:
                file.write(temporary.read_text())
        except OSError:
            lock.unlink()
            raise
    return True


def _replace_if_gone(run: RunFolder, temporary: Path, me: Holder) -> bool:
    """Take the place of a holder that is gone; False if the lock went in the meantime.

    Raises:
        RunInUseError: the holder is not gone.
    """
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(run.lock.open("r+"))
        except FileNotFoundError:
            return False
        # Of several processes that find the same dead holder one goes on; the others find another
        # file in its place. Where the file system knows no such locks, two of them must still meet
        # within the same instant.
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            if _identity(run.lock.stat()) != _identity(os.fstat(file.fileno())):
                return False
        except FileNotFoundError:
            return False
        os.utime(temporary)
        silent_s = temporary.stat().st_mtime - os.fstat(file.fileno()).st_mtime
        holder = _parse(file.read())
        gone = holder.is_gone(me, silent_s) if holder is not None else silent_s > STALE_S
        if not gone:
            raise RunInUseError(_refusal(run, holder, me, silent_s))
        temporary.replace(run.lock)
        return True


def _refusal(run: RunFolder, holder: Holder | None, me: Holder, silent_s: float) -> str:
    text = f"{run.path} is in use by {holder or 'a process that has just started'}"
    if holder is None or (holder.host, holder.boot) != (me.host, me.boot):
        text += (
            f" (last seen {max(0, silent_s):.0f} s ago; if it is gone, wait until that is "
            f"{STALE_S:.0f} s, or delete {run.lock})"
        )
    return f"{text}: wait for its end, stop it, or choose another run_id="


def _parse(text: str) -> Holder | None:
    """The holder; None of a file that is not written yet."""
    try:
        return Holder(**json.loads(text))
    except (ValueError, TypeError):
        return None


def _make_folders(folder: Path) -> list[Path]:
    """Make a folder and its parents -> those that were not there, innermost first."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _start_of(pid: int) -> int | None:
    """When a process started, in ticks since the boot; None if it has ended."""
    try:
        # The name in brackets may hold blanks and brackets.
        values = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    state, start = values[0], values[19]
    return None if state in "ZX" else int(start)


def _boot() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""
