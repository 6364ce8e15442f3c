"""A folder of results that is there whole or not at all, and is believed only as it was written.

    FOLDER/...              files
    FOLDER/manifest.json    kind, version, what they are, bytes and sha256 of every file: written last

It is written aside, as `.FOLDER.partial`, and published by one rename; what is replaced is of the same kind. Opening
reads every byte and compares. An export's manifest is called export.json, so each kind says the name of its own.
"""

import json
from collections.abc import Collection, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dist_proxygml.data.shards import publish
from dist_proxygml.storage.published import (
    file_problems,
    files_below,
    hash_files,
    publish_folder,
    put_back,
    replaced_path,
)

_VERSION = 1
_NUM_SHOWN = 3


class SealedKind(NamedTuple):
    """A kind of folder."""

    name: str
    """As its manifest says it."""
    remedy: str
    """What to do about a damaged one."""
    files: tuple[str, ...] = ()
    """What it consists of at least."""
    entries: Mapping[str, type | tuple[type, ...]] = {}
    """What its manifest has to say, and in which types."""
    manifest_file: str = "manifest.json"
    editable: Collection[str] = ()
    """Files that people may change."""


def check_is_free(out: Path, kind: SealedKind, *, overwrite: bool) -> None:
    """Refuse a place that holds something else, or the same kind without `overwrite`.

    Raises:
        ValueError: saying what is there.
    """
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


def seal(
    partial: Path, out: Path, kind: SealedKind, *, about: Mapping[str, Any], notes: Collection[str] = ()
) -> dict[str, Any]:
    """Write the manifest of the files in `partial` and publish the folder as `out`; returns the manifest. `notes` are
    files that only an interrupted writer needs: they go last.
    """
    names = [name for name in files_below(partial) if name not in (kind.manifest_file, *notes)]
    packages = ("dist_proxygml", "torch", "numpy")
    manifest = {
        "kind": kind.name,
        "version": _VERSION,
        "written_with": {name: version(name) for name in packages},
        **about,
        "files": hash_files(partial, names, num_threads=torch.get_num_threads()),
    }
    assert _missing_entry(manifest, kind) is None
    with publish(partial / kind.manifest_file) as stream:
        stream.write(json.dumps(manifest, indent=2, ensure_ascii=False).encode("utf-8") + b"\n")
    for name in notes:
        (partial / name).unlink()
    publish_folder(partial, out)
    return manifest


def open_sealed(path: Path, kind: SealedKind) -> dict[str, Any]:
    """The manifest of a sealed folder whose files are as they were written.

    Raises:
        ValueError: there is no such folder, it is of another kind, or a file differs; it ends with the remedy.
    """
    if not path.is_dir():
        earlier = replaced_path(path)
        hint = f"; an earlier one, which was about to be replaced, is {earlier}" if earlier.is_dir() else ""
        raise ValueError(f"expected {kind.name} at {path}, found no such folder{hint}; {kind.remedy}")
    manifest = _read_manifest(path, kind)
    if (manifest.get("kind"), manifest.get("version")) != (kind.name, _VERSION):
        is_there = (path / kind.manifest_file).exists()
        unknown = f"a damaged {kind.manifest_file}" if is_there else f"a folder without {kind.manifest_file}"
        found = f"{manifest.get('kind', unknown)!s} {manifest.get('version', '')}".rstrip()
        raise ValueError(f"expected {kind.name} of version {_VERSION} at {path}, found {found}; {kind.remedy}")
    try:
        problem = _missing_entry(manifest, kind)
        if problem is not None:
            raise LookupError(problem)
        checked = {name: entry for name, entry in manifest["files"].items() if name not in kind.editable}
        problems = file_problems(path, checked)
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path / kind.manifest_file} is damaged ({error!r}); {kind.remedy}") from None
    if problems:
        more = f" and {len(problems) - _NUM_SHOWN} more" if len(problems) > _NUM_SHOWN else ""
        raise ValueError(f"{path} is damaged: {'; '.join(problems[:_NUM_SHOWN])}{more}; {kind.remedy}")
    return manifest


def _missing_entry(manifest: Mapping[str, Any], kind: SealedKind) -> str | None:
    """What a manifest does not say, if anything."""
    for name, types in {"files": dict, **kind.entries}.items():
        if name not in manifest:
            return f"no entry {name!r}"
        if not isinstance(manifest[name], types):
            return f"entry {name!r} is {manifest[name]!r}"
    return next((f"no file {name!r}" for name in kind.files if name not in manifest["files"]), None)


def _read_manifest(path: Path, kind: SealedKind) -> dict[str, Any]:
    """The manifest of a folder; empty where there is none that can be read."""
    try:
        manifest = json.loads((path / kind.manifest_file).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return manifest if isinstance(manifest, dict) else {}
