"""A sealed folder is believed as it was written, replaced only by its kind, and takes nobody's files with it."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from dist_proxygml.storage.folder import SealedKind, check_is_free, make_empty, open_sealed, partial_path, seal

KIND = SealedKind(
    "a-kind",
    remedy="make it again",
    files=("a.txt",),
    entries={"count": int, "model": (dict, type(None))},
    manifest_file="about.json",
    editable=("README.md",),
)


def write(out: Path) -> Path:
    partial = partial_path(out)
    make_empty(partial)
    (partial / "a.txt").write_text("a")
    (partial / "README.md").write_text("edit me")
    (partial / "sub").mkdir()
    (partial / "sub" / "b.txt").write_text("b")
    seal(partial, out, KIND, about={"count": 3, "model": None})
    return out


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "out")


def test_what_was_written_is_read_and_a_card_may_be_edited(folder: Path) -> None:
    (folder / "README.md").write_text("edited")
    manifest = open_sealed(folder, KIND)
    assert (manifest["count"], manifest["model"]) == (3, None)
    assert sorted(manifest["files"]) == ["README.md", "a.txt", "sub/b.txt"]
    assert [path.name for path in folder.parent.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"count": None}, "entry 'count' is None"),
        ({"count": "3"}, "entry 'count' is '3'"),
        ({"model": 5}, "entry 'model' is 5"),
        ({"files": []}, r"entry 'files' is \[\]"),
        ({"files": {}}, "no file 'a.txt'"),
        ({"files": {"a.txt": {"bytes": 1}}}, "'sha256'"),
        ({"files": {"a.txt": 1}}, "not subscriptable"),
    ],
)
def test_a_manifest_that_was_edited_is_damaged(folder: Path, changes: dict[str, Any], problem: str) -> None:
    manifest = json.loads((folder / "about.json").read_text())
    (folder / "about.json").write_text(json.dumps(manifest | changes))
    with pytest.raises(ValueError, match=rf"about\.json.*{problem}"):
        open_sealed(folder, KIND)
    del manifest[next(iter(changes))]
    (folder / "about.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=rf"about\.json.*'{next(iter(changes))}'"):
        open_sealed(folder, KIND)


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"\xff", b'{"kind": '])
def test_a_manifest_that_cannot_be_read_is_not_called_missing(folder: Path, content: bytes) -> None:
    (folder / "about.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"a-kind.*version 1.*about\.json is damaged"):
        open_sealed(folder, KIND)
    (folder / "about.json").unlink()
    with pytest.raises(ValueError, match=r"about\.json is missing"):
        open_sealed(folder, KIND)


@pytest.mark.parametrize("name", ["../outside.txt", "sub/../../outside.txt", "/etc/hostname", "pipe"])
def test_a_manifest_names_regular_files_of_its_folder_alone(folder: Path, name: str) -> None:
    (folder.parent / "outside.txt").write_text("")
    os.mkfifo(folder / "pipe")
    manifest = json.loads((folder / "about.json").read_text())
    manifest["files"][name] = {"bytes": 0, "sha256": hashlib.sha256().hexdigest()}
    (folder / "about.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=rf"damaged: {name} (is no regular file|lies elsewhere)"):
        open_sealed(folder, KIND)


def test_a_link_to_itself_is_no_place_for_a_folder(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ValueError, match=r"\bloop\b.*link"):
        check_is_free(tmp_path / "loop", KIND, overwrite=True)


def test_all_files_that_differ_are_named(folder: Path) -> None:
    (folder / "a.txt").write_text("aa")
    (folder / "sub" / "b.txt").unlink()
    with pytest.raises(ValueError, match=r"a\.txt.*\b2 bytes.*\b1; sub/b\.txt.*No such"):
        open_sealed(folder, KIND)


def test_only_a_folder_of_the_same_kind_with_nothing_of_others_is_replaced(folder: Path) -> None:
    check_is_free(folder.parent / "new", KIND, overwrite=False)
    with pytest.raises(ValueError, match=r"a-kind.*--overwrite"):
        check_is_free(folder, KIND, overwrite=False)
    check_is_free(folder, KIND, overwrite=True)
    (folder / "sub" / "mine.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"sub/mine\.txt"):
        check_is_free(folder, KIND, overwrite=True)
    other = SealedKind("another-kind", remedy="", manifest_file="about.json")
    with pytest.raises(ValueError, match=r"another-kind"):
        check_is_free(folder, other, overwrite=True)


def test_a_folder_that_was_about_to_be_replaced_is_put_back(folder: Path) -> None:
    (folder.parent / "out").rename(folder.parent / ".out.replaced")
    with pytest.raises(ValueError, match=r"\.out\.replaced"):
        open_sealed(folder, KIND)
    check_is_free(folder, KIND, overwrite=True)
    assert open_sealed(folder, KIND)["count"] == 3


def test_a_folder_with_a_damaged_manifest_is_not_replaced(folder: Path) -> None:
    (folder / "about.json").write_text("{")
    with pytest.raises(ValueError, match=r"damaged about\.json"):
        check_is_free(folder, KIND, overwrite=True)
