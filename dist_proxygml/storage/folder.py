"""Folders that are published atomically and verified against a manifest: checkpoints, embeddings, indexes, exports.

    FOLDER/...              files
    FOLDER/manifest.json    kind, version, what they are, bytes and sha256 of every file: written last
    .FOLDER.partial         where a folder is written, before one rename publishes it
    .FOLDER.replaced        the FOLDER before that, of the same kind

A kind names its manifest and the entries in it. Opening compares the sizes of all files, and with `deep` their
hashes.

Declined: hashing while writing, as neither torch nor safetensors hands out its streams; files are read back, from
memory where they have just been written.
"""

import contextlib
import functools
import json
import os
import stat
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from dist_proxygml.faults import fault_point
from dist_proxygml.storage.files import (
    flush,
    is_folder,
    publish_text,
    read_document,
    refuse_unreadable,
    remove,
    sha256_of,
    unreadable,
)

_VERSION = 1
_NUM_SHOWN = 3


class SealedKind(NamedTuple):
    """A kind of folder."""

    name: str
    """Name in its manifest."""
    remedy: str
    """Remedy for a damaged one."""
    files: tuple[str, ...] = ()
    """Files that it has at least."""
    entries: Mapping[str, type | tuple[type, ...]] = {}
    """Required entries of its manifest, and their types."""
    manifest_file: str = "manifest.json"
    editable: Collection[str] = ()
    """Files that people may change."""
    is_named: bool = True
    """Whether the manifest says the kind's name; that of a checkpoint never has."""


def check_is_free(out: Path, kind: SealedKind, *, overwrite: bool) -> None:
    """Refuse a path that holds something else, or the same kind without `overwrite`.

    Raises:
        ValueError: saying what is there.
    """
    if out.is_symlink() and not out.exists():
        raise ValueError(f"expected a place for a folder at {out}, found a link to nowhere; remove it, or name another")
    put_back(out)
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    manifest = _read_manifest(out, kind)
    if not manifest and (out / kind.manifest_file).is_file():
        raise ValueError(f"expected nothing at {out}, found a damaged {kind.manifest_file}; remove it, or name another")
    if manifest.get("kind") != kind.name:
        raise ValueError(
            f"expected nothing or an earlier {kind.name} at {out}, found something else; name another folder"
        )
    if not overwrite:
        raise ValueError(f"expected nothing at {out}, found {kind.name}; name another folder, or add --overwrite")
    listed = manifest.get("files")
    own = {kind.manifest_file, *kind.editable, *(listed if isinstance(listed, dict) else ())}
    others = sorted(set(files_below(out)) - own)
    if others:
        raise ValueError(
            f"expected {kind.name} alone at {out}, found {', '.join(others[:_NUM_SHOWN])} besides, which would be "
            "lost; move what is yours, or name another folder"
        )


def seal(partial: Path, out: Path, kind: SealedKind, *, about: Mapping[str, Any]) -> dict[str, Any]:
    """Write the manifest of the files in `partial` and publish the folder as `out`; returns the manifest."""
    names = [name for name in files_below(partial) if name != kind.manifest_file]
    versions = {"written_with": {name: version(name) for name in ("dist_proxygml", "torch", "numpy")}}
    files = hash_files(partial, names, num_threads=len(os.sched_getaffinity(0)))
    manifest = write_manifest(partial, kind, versions | dict(about), files)
    publish_folder(partial, out)
    return manifest


def open_sealed(path: Path, kind: SealedKind, *, deep: bool = True) -> dict[str, Any]:
    """The manifest of a sealed folder whose files have the sizes, and with `deep` the contents, that they had when they
    were written.

    Raises:
        ValueError: there is no such folder, it is of another kind, or a file differs; it ends with the remedy.
    """
    if not path.is_dir():
        earlier = replaced_path(path)
        hint = f"; an earlier one, which was about to be replaced, is {earlier}" if earlier.is_dir() else ""
        raise ValueError(f"expected {kind.name} at {path}, found no such folder{hint}; {kind.remedy}")
    manifest, problems = look_into(path, kind, deep=deep)
    if manifest is None:
        raise ValueError(f"expected {kind.name} of version {_VERSION} at {path}, but {problems[0]}; {kind.remedy}")
    if problems:
        raise ValueError(f"{path} is damaged: {shortened(problems)}; {kind.remedy}")
    return manifest


def look_into(path: Path, kind: SealedKind, *, deep: bool) -> tuple[dict[str, Any] | None, list[str]]:
    """Read the manifest of a folder, None without a usable one, and list the folder's problems, none if it is whole.

    Raises:
        ValueError: the manifest or a file that it lists is there and cannot be read.
    """
    name = kind.manifest_file
    try:
        manifest = read_document(path / name)
    except (FileNotFoundError, NotADirectoryError):
        return None, [f"{name} is missing: never finished, or written by an older version of this package"]
    except OSError as error:
        raise unreadable(path / name, error) from None
    except ValueError as error:
        return None, [f"{name} is damaged ({error})"]
    found = (manifest.get("kind"), manifest.get("version"))
    if found != (kind.name if kind.is_named else None, _VERSION):
        says = [f"{key} {value!r}" for key, value in zip(("kind", "version"), found, strict=True) if value is not None]
        return None, [f"{name} says {', '.join(says) or 'no kind and no version'}, expected version {_VERSION}"]
    try:
        if problem := _missing_entry(manifest, kind):
            raise LookupError(problem)
        listed = {name: entry for name, entry in manifest["files"].items() if name not in kind.editable}
        return manifest, file_problems(path, listed, deep=deep)
    except (LookupError, TypeError, AttributeError) as error:
        return None, [f"{name} is damaged ({error!r})"]


def shortened(problems: Sequence[str]) -> str:
    """The first problems of a list, for a message."""
    more = f" and {len(problems) - _NUM_SHOWN} more" if len(problems) > _NUM_SHOWN else ""
    return f"{'; '.join(problems[:_NUM_SHOWN])}{more}"


def write_manifest(
    folder: Path, kind: SealedKind, about: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Write the manifest of files whose contents are on disk, and bring the names of all to disk; returns it."""
    manifest = {**({"kind": kind.name} if kind.is_named else {}), "version": _VERSION, **about, "files": dict(files)}
    assert _missing_entry(manifest, kind) is None
    publish_text(folder / kind.manifest_file, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    for below in (path for path in folder.rglob("*") if path.is_dir()):
        flush(below)
    return manifest


def _missing_entry(manifest: Mapping[str, Any], kind: SealedKind) -> str | None:
    """Name the entry that a manifest lacks, if any."""
    for name, types in {"files": dict, **kind.entries}.items():
        if name not in manifest:
            return f"no entry {name!r}"
        if not isinstance(manifest[name], types):
            return f"entry {name!r} is {manifest[name]!r}"
    return next((f"no file {name!r}" for name in kind.files if name not in manifest["files"]), None)


def _read_manifest(path: Path, kind: SealedKind) -> dict[str, Any]:
    """The manifest of a folder; empty where there is none, or something else.

    Raises:
        ValueError: it is there and cannot be read.
    """
    try:
        return read_document(path / kind.manifest_file)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    except OSError as error:
        raise unreadable(path / kind.manifest_file, error) from None


# ---- files of a folder, and its place -------------------------------------------------------------------------------


def partial_path(final: Path) -> Path:
    """Path at which a folder is written before it is published at `final`."""
    return final.with_name(f".{final.name}.partial")


def make_empty(directory: Path) -> None:
    """Make a folder, without what a killed run may have left in its place."""
    remove(directory)
    directory.mkdir(parents=True)


def files_below(directory: Path) -> list[str]:
    """Names of all files, the largest first, so that every n-th is about a fair share of the bytes.

    Raises:
        ValueError: a folder cannot be read.
    """
    sizes = {}
    for folder, _, names in os.walk(directory, onerror=refuse_unreadable):
        for path in (Path(folder, name) for name in names):
            if path.is_file():
                sizes[str(path.relative_to(directory))] = path.stat().st_size
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
    return {"sha256": sha256_of(path), "bytes": path.stat().st_size}


def publish_folder(partial: Path, final: Path) -> None:
    """Rename, keeping what was there aside until that is done."""
    replaced = replaced_path(final)
    if os.path.lexists(final):
        remove(replaced)
        os.rename(final, replaced)
    try:
        fault_point("save.publish")
        os.rename(partial, final)
        flush(final.parent)
    except OSError:
        if not partial.exists():
            os.rename(final, partial)
        if os.path.lexists(replaced):
            os.rename(replaced, final)
        raise
    with contextlib.suppress(OSError):
        remove(replaced)


def put_back(final: Path) -> None:
    """Restore `final` where its writer was killed between moving the old one away and publishing the new one."""
    replaced = replaced_path(final)
    if not replaced.is_symlink() and is_folder(replaced) and not os.path.lexists(final):
        os.rename(replaced, final)


def replaced_path(final: Path) -> Path:
    """Path that keeps the old `final` until the new one is published."""
    return final.with_name(f".{final.name}.replaced")


def file_problems(directory: Path, files: Mapping[str, Mapping[str, Any]], *, deep: bool = True) -> list[str]:
    """List the problems of the files in a manifest, in its order; none if all are as they were written.

    Args:
        directory: where they lie.
        files: entries as `hash_files` gives them, by name.
        deep: compare the sha256 of every file, besides its size.

    Raises:
        LookupError, TypeError, AttributeError: the entries are something else.
        ValueError: a file is there and cannot be read.
    """
    listed = [(str(name), entry["bytes"], entry["sha256"]) for name, entry in files.items()]
    problem_of = functools.partial(_file_problem, directory, deep=deep)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        return [problem for problem in threads.map(lambda entry: problem_of(*entry), listed) if problem is not None]


def _file_problem(directory: Path, name: str, size: int, sha256: str, *, deep: bool) -> str | None:
    if name.startswith("/") or ".." in name.split("/"):  # the manifest may be a stranger's
        return f"{name} lies elsewhere"
    try:
        found = (directory / name).stat()
        if not stat.S_ISREG(found.st_mode):  # a pipe would be waited for
            return f"{name} is no regular file"
        if found.st_size != size:
            return f"{name} has {found.st_size} bytes, expected {size}"
        if deep:
            digest = sha256_of(directory / name)
            if digest != sha256:
                return f"{name} has sha256 {digest[:12]}..., expected {sha256[:12]}..."
    except (FileNotFoundError, NotADirectoryError) as error:
        return f"{name} cannot be read: {error.strerror}"
    except OSError as error:
        raise unreadable(directory / name, error) from None
    return None
