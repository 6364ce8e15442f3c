"""Locks between processes: of a folder while it is written, of a file for a moment.

Two jobs of one name would remove each other's half-written checkpoints, so a folder has one writer. Its lock is
POSIX's (`fcntl.lockf`): it ends with the process however that ends, forked data loading processes do not inherit it,
and network file systems know it. It does not keep threads of one process apart; `flock` does, for a moment's lock.
"""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from dist_proxygml.storage.files import describe_error


class FolderLock:
    """Lock of a folder, a file beside it, held from construction on; `elsewhere` says how to name another.

    Raises:
        ValueError: another process has it, or it cannot be written.
    """

    def __init__(
        self, folder: Path, *, elsewhere: str = "name another with --set name=NAME or runs_dir=FOLDER"
    ) -> None:
        self._path = folder.with_name(f".{folder.name}.lock")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file: TextIO = self._path.open("a+", encoding="utf-8")
        except OSError as error:
            parent = self._path.parent
            raise ValueError(
                f"expected to write into {parent.resolve()}: {describe_error(error, parent)}; {elsewhere}"
            ) from None
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            self._file.close()
            raise ValueError(f"{folder} is in use by {holder}; wait until it has ended, or {elsewhere}") from None
        except OSError:  # a file system without locks: nothing to hold on to
            return
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()

    def release(self, *, is_done: bool = False) -> None:
        """Release the lock; with `is_done`, remove its file, too."""
        if is_done:
            self._path.unlink(missing_ok=True)
        self._file.close()


@contextmanager
def locked_file(path: Path, *, wait: bool) -> Iterator[bool]:
    """Lock a file against other processes and threads; gives whether it is held, always True with `wait`."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        try:
            yield True
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing is not enough: a process forked meanwhile shares the lock
    finally:
        os.close(descriptor)
