"""A search index with images added and removed: what is found, what the next start finds, what is refused."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dist_proxygml import Index
from dist_proxygml.data.sources import ImageRecord
from dist_proxygml.inference import live_index
from dist_proxygml.inference.live_index import LOG_FILE, LiveIndex

DIM = 8


def unit_rows(num_rows: int, seed: int) -> np.ndarray:
    rows_nD = np.random.default_rng(seed).standard_normal((num_rows, DIM)).astype(np.float32)
    return rows_nD / np.linalg.norm(rows_nD, axis=1, keepdims=True)


ROWS = unit_rows(300, seed=0)
QUERY = unit_rows(1, seed=1)[0]


@pytest.fixture(params=["flat", "hnsw", "ivf"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], LiveIndex]:
    """Open the same index again and again."""
    Index.build(ROWS, [f"{row:03d}" for row in range(300)], kind=request.param, target_recall=1.0).save(tmp_path / "i")
    return lambda: LiveIndex(Index.load(tmp_path / "i"), tmp_path / "i", tmp_path / "i.changes")


def order(rows: dict[str, np.ndarray]) -> list[str]:
    """Ids by brute force, nearest first."""
    return sorted(rows, key=lambda id: -float(rows[id] @ QUERY))


def test_what_is_found_is_what_a_rebuilt_index_would_find(opened: Callable[[], LiveIndex]) -> None:
    live = opened()
    rows = {f"{row:03d}": ROWS[row] for row in range(300)}
    for id in order(rows)[:20] + order(rows)[25:30]:  # the nearest ones, so that many must be asked for
        live.remove(id)
        del rows[id]
    for number, row_D in enumerate(unit_rows(12, seed=2)):
        live.add(ImageRecord(f"new {number}", class_name="new"), row_D, b"an image")
        rows[f"new {number}"] = row_D
    live.remove("new 3")
    del rows["new 3"]
    assert len(live) == len(rows)
    assert [found.record.id for found in live.search(QUERY, 30)] == order(rows)[:30]
    assert [found.record.id for found in live.search(QUERY, 1000)] == order(rows)
    nearest = order(rows)[0]
    assert [found.record.id for found in live.search(QUERY, 5, without=nearest)] == order(rows)[1:6]
    live.close()

    again = opened()
    assert [found.record.id for found in again.search(QUERY, 1000)] == order(rows)
    assert again.record("new 0").class_name == "new"
    file, gone = again.added_file("new 0"), again.added_file("new 3")
    assert file is not None
    assert file.read_bytes() == b"an image"
    assert gone is None
    assert len(list(file.parent.iterdir())) == 11


def test_ids_are_taken_once_and_come_free_again(opened: Callable[[], LiveIndex]) -> None:
    live = opened()
    with pytest.raises(ValueError, match="007"):
        live.add(ImageRecord("007"), QUERY, b"")
    live.remove("007")
    for gone in ("007", "nobody"):
        with pytest.raises(KeyError, match=gone):
            live.remove(gone)
    live.add(ImageRecord("007"), QUERY, b"")
    assert live.search(QUERY, 1)[0].record.id == "007"
    live.close()
    again = opened()
    assert again.search(QUERY, 1)[0].score == pytest.approx(1, abs=1e-6)
    again.remove("007")
    with pytest.raises(KeyError):
        again.record("007")


def test_a_line_that_a_kill_cut_short_is_dropped_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    Index.build(ROWS, [str(row) for row in range(300)]).save(tmp_path / "i")
    changes = tmp_path / "i.changes"

    def open_live() -> LiveIndex:
        return LiveIndex(Index.load(tmp_path / "i"), tmp_path / "i", changes)

    live = open_live()
    live.remove("1")
    live.add(ImageRecord("new"), QUERY, b"")
    live.close()
    whole = (changes / LOG_FILE).read_bytes()
    (changes / LOG_FILE).write_bytes(whole + whole.splitlines()[-1][:40])
    live = open_live()
    assert len(live) == 300
    live.close()
    assert (changes / LOG_FILE).read_bytes() == whole
    (changes / LOG_FILE).write_bytes(whole.replace(b'"row": "', b'"row": "AAAA'))
    with pytest.raises(ValueError, match=LOG_FILE):
        open_live()


def test_changes_of_another_index_are_refused(tmp_path: Path) -> None:
    for name in ("one", "other"):
        Index.build(ROWS, [f"{name} {row}" for row in range(300)]).save(tmp_path / name)
    live = LiveIndex(Index.load(tmp_path / "one"), tmp_path / "one", tmp_path / "changes")
    live.remove("one 1")
    live.close()
    with pytest.raises(ValueError, match="--changes"):
        LiveIndex(Index.load(tmp_path / "other"), tmp_path / "other", tmp_path / "changes")


def test_changes_embedded_by_another_model_are_refused_and_those_of_earlier_versions_are_read(tmp_path: Path) -> None:
    def open_live(weights: str) -> LiveIndex:
        model = {"weights_sha256": weights}
        Index.build(ROWS, [str(row) for row in range(300)], model=model).save(tmp_path / weights)
        return LiveIndex(Index.load(tmp_path / weights), tmp_path / weights, tmp_path / "changes")

    live = open_live("a")
    live.add(ImageRecord("new"), QUERY, b"")
    live.close()
    with pytest.raises(ValueError, match="model"):
        open_live("b")
    log = tmp_path / "changes" / LOG_FILE
    log.write_text(log.read_text().replace(', "model": "a"', "", 1))
    assert len(open_live("c")) == 301


@pytest.mark.parametrize("left", [0, 20])
def test_a_kill_before_the_first_line_was_written_leaves_no_changes(tmp_path: Path, left: int) -> None:
    Index.build(ROWS, [str(row) for row in range(300)]).save(tmp_path / "i")
    for num_images, change in ((300, "1"), (299, "2")):
        live = LiveIndex(Index.load(tmp_path / "i"), tmp_path / "i", tmp_path / "i.changes")
        assert len(live) == num_images
        live.remove(change)
        live.close()
        if change == "1":
            log = tmp_path / "i.changes" / LOG_FILE
            whole = log.read_bytes()
            log.write_bytes(whole[:left])
            live = LiveIndex(Index.load(tmp_path / "i"), tmp_path / "i", tmp_path / "i.changes")
            assert len(live) == 300
            live.remove("1")
            live.close()
            assert log.read_bytes() == whole


def test_a_change_that_the_disk_does_not_take_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Index.build(ROWS, [str(row) for row in range(300)]).save(tmp_path / "i")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    live = LiveIndex(Index.load(tmp_path / "i"), tmp_path / "i", tmp_path / "c")
    live.remove("1")
    before = (tmp_path / "c" / LOG_FILE).read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(live_index.os, "fsync", full)
        with pytest.raises(OSError, match="space"):
            live.remove("2")
        assert (tmp_path / "c" / LOG_FILE).read_bytes() == before
    assert live.record("2").id == "2"
    live.remove("3")
    live.close()
    again = LiveIndex(Index.load(tmp_path / "i"), tmp_path / "i", tmp_path / "c")
    assert len(again) == 298
    assert again.record("2").id == "2"
