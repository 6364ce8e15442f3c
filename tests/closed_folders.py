"""Folders that are closed to a user."""

import contextlib
import stat
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def closed(path: Path) -> Iterator[None]:
    """Nobody may read it in here."""
    mode = stat.S_IMODE(path.stat().st_mode)
    path.chmod(0)
    try:
        yield
    finally:
        path.chmod(mode)
