"""Folders that are there whole or not at all, and whose every file is as it was written.

    .NAME.partial    where a folder is written, before one rename publishes it as NAME
    .NAME.replaced   what was NAME until then

A manifest lists bytes and sha256 of the files; what it is called and what else it says is its owner's business:
checkpoint/folder.py and folder.py.

Declined: hashing while writing, as neither torch nor safetensors hands out its streams; files are read back, from
memory where they have just been written.
"""

import functools
import hashlib
import os
import shutil
import stat
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dist_proxygml.faults import fault_point


def partial_path(final: Path) -> Path:
    """Where a folder is written before it is published at `final`."""
    return final.with_name(f".{final.name}.partial")


def make_empty(directory: Path) -> None:
    """Make a folder, without what a killed run may have left in its place."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)


def flush(path: Path) -> None:
    """Bring a file or a folder's names to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def files_below(directory: Path) -> list[str]:
    """Names of all files, the largest first, so that every n-th is about a fair share of the bytes."""
    sizes = {str(p.relative_to(directory)): p.stat().st_size for p in directory.rglob("*") if p.is_file()}
    return sorted(sizes, key=lambda name: (-sizes[name], name))


def hash_files(directory: Path, names: Sequence[str], *, num_threads: int) -> dict[str, dict[str, Any]]:
    """Entries of files in the manifest; what has an entry is on disk. Flushing waits for the disk and hashing keeps the
    processor busy, so they go side by side.
    """
    with ThreadPoolExecutor(1) as disk, ThreadPoolExecutor(num_threads) as threads:
        flushed = [disk.submit(flush, directory / name) for name in names]
        entries = dict(zip(names, threads.map(lambda name: _describe(directory / name), names), strict=True))
        for done in flushed:
            done.result()
        return entries


def _describe(path: Path) -> dict[str, Any]:
    """A file's entry in the manifest."""
    with open(path, "rb") as stream:
        return {"sha256": hashlib.file_digest(stream, "sha256").hexdigest(), "bytes": stream.tell()}


def publish_folder(partial: Path, final: Path) -> None:
    """Rename, with what was there out of the way but not gone before that is done."""
    replaced = replaced_path(final)
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(final, replaced)
    try:
        fault_point("save.publish")
        os.rename(partial, final)
        flush(final.parent)
    except OSError:
        if not partial.exists():
            os.rename(final, partial)
        if replaced.exists():
            os.rename(replaced, final)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def put_back(final: Path) -> None:
    """What `final` was, where who published it was killed between taking it away and putting the new one there."""
    replaced = replaced_path(final)
    if replaced.is_dir() and not final.exists():
        os.rename(replaced, final)


def replaced_path(final: Path) -> Path:
    """Where what was at `final` waits until something else is there."""
    return final.with_name(f".{final.name}.replaced")


def file_problems(directory: Path, files: Mapping[str, Mapping[str, Any]], *, deep: bool = True) -> list[str]:
    """What is wrong with the files that a manifest lists, in its order; nothing if all are as they were written.

    Args:
        directory: where they lie.
        files: entries as `hash_files` gives them, by name.
        deep: compare the sha256 of every file, besides its size.

    Raises:
        LookupError, TypeError, AttributeError: the entries are something else.
    """
    listed = [(str(name), entry["bytes"], entry["sha256"]) for name, entry in files.items()]
    problem_of = functools.partial(_file_problem, directory, deep=deep)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        return [problem for problem in threads.map(lambda entry: problem_of(*entry), listed) if problem is not None]


def _file_problem(directory: Path, name: str, size: int, sha256: str, *, deep: bool) -> str | None:
    if name.startswith("/") or ".." in name.split("/"):  # the manifest may be a stranger's
        return f"{name} is no file of the folder"
    try:
        found = (directory / name).stat()
        if not stat.S_ISREG(found.st_mode):  # a pipe would be waited for
            return f"{name} is no regular file"
        if found.st_size != size:
            return f"{name} has {found.st_size} bytes, expected {size}"
        if deep:
            with open(directory / name, "rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            if digest != sha256:
                return f"{name} has sha256 {digest[:12]}..., expected {sha256[:12]}..."
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"
    return None
