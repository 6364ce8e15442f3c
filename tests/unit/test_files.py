"""Absent and unreadable are told apart, logs are read whatever is in them, full disks and pipes are named."""

import errno
import math
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dist_proxygml.checkpoint.model import read_class_table
from dist_proxygml.data.sources import FolderSource, ImageRecord
from dist_proxygml.evaluation.best import read_evaluations
from dist_proxygml.evaluation.evaluator import EvaluationResult
from dist_proxygml.storage import files
from dist_proxygml.storage.files import (
    describe_error,
    mend_log,
    mode_of,
    parse_json,
    paths_in,
    read_document,
    read_log,
    remove,
)
from dist_proxygml.storage.folder import SealedKind, check_is_free, files_below, open_sealed
from tests.closed_folders import closed

ROOT = Path(__file__).parents[2]


def test_a_closed_folder_is_not_an_empty_one(folder: Path) -> None:
    inner = folder / "evaluation"
    inner.mkdir()
    (inner / "step-000001.json").write_text("{}")
    assert paths_in(folder / "absent") == []
    assert mode_of(folder / "evaluation" / "step-000001.json" / "below a file") is None
    with closed(inner):
        for look in (
            lambda: paths_in(inner, "step-*.json"),
            lambda: read_evaluations(folder),
            lambda: mode_of(inner / "step-000001.json"),
            lambda: files_below(folder),
            lambda: FolderSource.of_folder(folder),
        ):
            with pytest.raises(ValueError, match=r"evaluation.*Permission denied"):
                look()
    assert [path.name for path in paths_in(inner, "step-*.json")] == ["step-000001.json"]


def test_a_closed_manifest_is_not_a_damaged_one(folder: Path) -> None:
    kind, out = SealedKind("a-kind", remedy="make it again"), folder / "out"
    out.mkdir()
    (out / "manifest.json").write_text("{}")
    with closed(out / "manifest.json"):
        for look in (lambda: open_sealed(out, kind), lambda: check_is_free(out, kind, overwrite=True)):
            with pytest.raises(ValueError, match=r"manifest\.json.*Permission denied"):
                look()


def test_a_link_to_nothing_is_not_an_absent_folder(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "unmounted")
    with pytest.raises(ValueError, match=r"link.*/link\b"):
        paths_in(tmp_path / "link")


def test_whatever_is_there_is_removed_and_what_a_link_leads_to_stays(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (tmp_path / "folder" / "below").mkdir(parents=True)
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(kept)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("folder", "file", "link", "dangling", "absent"):
        remove(tmp_path / name)
    assert os.listdir(tmp_path) == ["kept"]


@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff", b"[" * 200_000])
def test_a_document_that_is_none_is_a_mistake_that_names_it(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.json.*JSON"):
        read_document(path)


def test_a_whole_number_that_no_tensor_holds_is_none() -> None:
    read = parse_json(f"[{2**63 - 1}, {-(2**59)}, {10**30}, {'9' * 5000}]")
    assert read == [2**63 - 1, -(2**59), 1e30, math.inf]
    assert [type(number) for number in read] == [int, int, float, float]


@pytest.mark.parametrize("read", [parse_json, ImageRecord.from_json, EvaluationResult.from_json, read_class_table])
def test_brackets_without_an_end_are_a_mistake_whoever_reads_them(
    tmp_path: Path, read: Callable[[Any], object]
) -> None:
    (tmp_path / "deep.json").write_bytes(b"[" * 200_000)
    with pytest.raises(ValueError, match="brackets"):
        read(tmp_path / "deep.json" if read is read_class_table else b"[" * 200_000)


@pytest.mark.timeout(240)
def test_a_pipe_in_the_place_of_a_file_keeps_nobody_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.json")
    for path in (tmp_path / "a.json", tmp_path):
        with pytest.raises(ValueError, match=r"expected a file at .*, found something else; move it away"):
            read_document(path)


ODD = [
    b"\xff{}",
    b'{"step": 3}{"step": 4}',
    b'{"a": 1}',
    b"[" * 200_000,
    b"[3]",
    b'{"step": "3"}',
    b'{"step": true}',
]


def test_odd_lines_of_a_log_are_set_aside_and_told_once(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    good = [b'{"step": 1}', b'{"step": 2, "x": NaN}']
    path.write_bytes(b"\n".join([good[0], *ODD, good[1], b"", b'{"step": 5, "lo']))  # a kill cut the last one short
    log = read_log(path, {"step": int})
    assert [record["step"] for _, record in log.records] == [1, 2]
    assert [line for _, line, _ in log.odd] == ODD
    (told,) = mend_log(path, {"step": int}, keep=lambda record: record["step"] < 2)
    assert told.startswith(f"{path}: line 2 and 6 more cannot be used (UnicodeDecodeError")
    assert told.endswith("passed over, now in a.jsonl.odd")
    assert path.read_bytes() == good[0] + b"\n"
    assert (tmp_path / "a.jsonl.odd").read_bytes().splitlines() == ODD
    assert mend_log(path, {"step": int}) == []
    assert mend_log(tmp_path / "absent.jsonl", {"step": int}) == []
    assert not (tmp_path / "absent.jsonl").exists()


def space(free: int) -> SimpleNamespace:
    return SimpleNamespace(f_bavail=free, f_frsize=1, f_blocks=64 << 20, f_favail=7, f_files=9)


def test_a_full_disk_is_named_with_its_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "statvfs", lambda path: space(5))
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path)
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "runs" / "a"))
    assert describe_error(error) == (
        f"[Errno 28] No space left on device: '{tmp_path}/runs/a'; {tmp_path} is on the file system {tmp_path}, which "
        "has 5 of 67,108,864 bytes and 7 of 9 files left; make room there and start again"
    )
    assert describe_error(OSError(errno.EIO, "Input/output error")) == "[Errno 5] Input/output error"


def test_shared_memory_that_is_full_is_told_from_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "statvfs", lambda path: space(5 if str(path) == files._SHARED_MEMORY else 60 << 20))
    for text in (
        "Caught RuntimeError in a worker\nunable to write to file </torch_1_2>: No space left on device (28)",
        "[Errno 28] No space left on device",  # of a semaphore, which names no file
        "DataLoader worker is killed by signal: Bus error. Maybe it is out of shared memory.",
    ):
        told = describe_error(RuntimeError(text))
        assert "\n" not in told
        assert told.count("is on the file system") == 1
        assert "/dev/shm is on the file system /dev/shm, which has 5 of" in told
        assert "docker run --shm-size=8g" in told
