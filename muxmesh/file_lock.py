"""Locks on files, which the kernel frees when their process ends, however it ends. They hold across containers too."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from muxmesh.errors import ConfigError
from muxmesh.file_access import why_denied
from muxmesh.process_files import process_file


class LockHeldError(Exception):
    """Another process holds the lock. ``pid`` is what it wrote into the file, for people only."""

    def __init__(self, pid: str) -> None:
        super().__init__(f"held by process {pid}")
        self.pid = pid


@contextlib.contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Creates the file and holds the lock on it while the block runs. Raises OSError or LockHeldError."""
    lock = _locked(path)
    while not _is_at(lock, path):  # its last holder has deleted it in between
        os.close(lock)
        lock = _locked(path)
    try:
        with contextlib.suppress(OSError):  # a full disk: the lock holds without the pid
            os.ftruncate(lock, 0)
            os.write(lock, str(os.getpid()).encode())
        yield
    finally:
        os.close(lock)


def _locked(path: Path) -> int:
    """A file descriptor of the file, with the lock. Raises OSError or LockHeldError."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(lock, 20).decode(errors="replace").strip()
        os.close(lock)
        raise LockHeldError(holder) from None
    except OSError:
        os.close(lock)
        raise
    return lock


def _is_at(fd: int, path: Path) -> bool:
    """Whether the open file is the one at ``path``."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def only_process(run_dir: Path, name: str) -> Iterator[None]:
    """Holds the name of a process on a run folder while the block runs, so that no other takes its sockets.

    Deletes the file afterwards, since names of routers in containers are used once.
    Raises ConfigError if another process has the name, or this one may not create sockets in the folder.
    """
    path = run_dir / process_file(name, ".lock")
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(file_lock(path))
        except LockHeldError as error:
            raise ConfigError(
                f"another {name} already runs on {run_dir} (pid {error.pid}); each mesh needs a run folder of its own, "
                "each router on it another --name"
            ) from None
        except PermissionError as error:
            raise ConfigError(why_denied(path)) from error
        except OSError as error:
            raise ConfigError(f"{run_dir}: no socket can be created there: {error.strerror}") from error
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                path.unlink()
