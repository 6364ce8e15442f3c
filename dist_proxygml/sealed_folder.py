"""A folder of results that is there whole or not at all, and is believed only as it was written.

    FOLDER/...              files
    FOLDER/manifest.json    kind, version, bytes and sha256 of every file, and what they are: written last

It is written aside, as `.FOLDER.partial`, and published by one rename; what is replaced is of the same kind. Opening
reads every byte and compares.
"""

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from dist_proxygml.checkpoint_folder import files_below, flush, hash_files, publish_checkpoint
from dist_proxygml.data.shards import publish

MANIFEST_FILE = "manifest.json"


def check_is_free(out: Path, *, kind: str, overwrite: bool) -> None:
    """Refuse a place that holds something else, or the same kind without `overwrite`.

    Raises:
        ValueError: saying what is there.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if _read_manifest(out).get("kind") != kind:
        raise ValueError(f"expected nothing or an earlier {kind} at {out}, found something else; name another folder")
    if not overwrite:
        raise ValueError(f"expected nothing at {out}, found {kind}; name another folder, or add --overwrite")


def seal(partial: Path, out: Path, *, kind: str, about: Mapping[str, Any]) -> dict[str, Any]:
    """Write the manifest of the files in `partial` and publish the folder as `out`; returns the manifest."""
    names = files_below(partial)
    for name in names:
        flush(partial / name)
    packages = ("dist_proxygml", "torch", "numpy")
    manifest = {
        "kind": kind,
        "version": 1,
        **about,
        "written_with": {name: version(name) for name in packages},
        "files": hash_files(partial, names, num_threads=torch.get_num_threads()),
    }
    with publish(partial / MANIFEST_FILE) as stream:
        stream.write(json.dumps(manifest, indent=2, ensure_ascii=False).encode("utf-8") + b"\n")
    publish_checkpoint(partial, out)
    return manifest


def open_sealed(path: Path, *, kind: str, remedy: str) -> dict[str, Any]:
    """The manifest of a sealed folder whose files are as they were written.

    Raises:
        ValueError: there is no such folder, it is of another kind, or a file differs; it ends with the remedy.
    """
    if not path.is_dir():
        raise ValueError(f"expected {kind} at {path}, found no such folder; {remedy}")
    manifest = _read_manifest(path)
    if (manifest.get("kind"), manifest.get("version")) != (kind, 1):
        raise ValueError(
            f"expected {kind} of version 1 at {path}, found {manifest.get('kind', 'a folder without its manifest')!s} "
            f"{manifest.get('version', '')}".rstrip()
            + f"; {remedy}"
        )
    try:
        listed = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path / MANIFEST_FILE} is damaged ({error!r}); {remedy}") from None
    for name, expected in listed.items():
        try:
            with open(path / name, "rb") as stream:
                found = stream.seek(0, 2), ""
                stream.seek(0)
                if found[0] == expected[0]:
                    found = found[0], hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise ValueError(f"{path} is damaged: {name} cannot be read: {error.strerror}; {remedy}") from None
        if found != expected:
            raise ValueError(
                f"{path} is damaged: expected {name} of {expected[0]} bytes and sha256 {expected[1][:12]}..., got "
                f"{found[0]} bytes{' and ' + found[1][:12] + '...' if found[1] else ''}; {remedy}"
            )
    return manifest


def _read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a folder; empty where there is none that can be read."""
    try:
        manifest = json.loads((path / MANIFEST_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return manifest if isinstance(manifest, dict) else {}
