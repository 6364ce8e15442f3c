"""Processes of a DataLoader start for sure: one that stands still is ended, and all are started again."""

import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch

from dist_proxygml.data import workers
from dist_proxygml.data.workers import WorkerLoader


def stand_still_at_first(monkeypatch: pytest.MonkeyPatch, folder: Path, *, times: int) -> None:
    """In so many starts the second process stands still; `folder` has the numbers of all."""

    def begin(worker: int) -> None:
        starts = len(list(folder.glob(f"{worker}-*")))
        (folder / f"{worker}-{os.getpid()}").touch()
        while worker == 1 and starts < times:
            signal.pause()

    monkeypatch.setattr(workers, "ignore_stop_signals", begin)
    monkeypatch.setattr(workers, "SECONDS_TO_START", 2.0)


def process_ids(folder: Path) -> list[int]:
    return [int(path.name.partition("-")[2]) for path in folder.iterdir()]


@pytest.mark.timeout(60)
def test_a_process_that_stands_still_is_ended_and_all_begin_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_still_at_first(monkeypatch, tmp_path, times=1)
    others = multiprocessing.active_children()  # of tests before
    loader = WorkerLoader(range(6), num_workers=2, batch_size=2)
    assert [batch.tolist() for batch in loader] == [[0, 1], [2, 3], [4, 5]]
    assert len(process_ids(tmp_path)) == 4
    assert set(multiprocessing.active_children()) <= set(others)
    assert [batch.tolist() for batch in loader] == [[0, 1], [2, 3], [4, 5]]
    assert len(process_ids(tmp_path)) == 6, "each iteration has two processes of its own, started once"


@pytest.mark.timeout(60)
def test_a_process_that_never_begins_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_still_at_first(monkeypatch, tmp_path, times=9)
    others = multiprocessing.active_children()
    monkeypatch.setattr(workers, "MOST_STARTS", 2)
    with pytest.raises(ValueError, match=r"expected 2 data loading processes to begin within 2 s.*any of 2 attempts"):
        iter(WorkerLoader(range(6), num_workers=2, batch_size=2))
    assert set(multiprocessing.active_children()) <= set(others)


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    assert len(list(WorkerLoader(range(6), num_workers=0, batch_size=4))) == 2
    assert torch.equal(torch.get_rng_state(), before)
