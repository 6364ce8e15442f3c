"""Processes of a DataLoader start for sure: one that stands still is ended, and all are started again."""

import multiprocessing
import os
import signal
import subprocess
import sys
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
    monkeypatch.setattr(workers, "SECONDS_TO_START", (1.0, 1.0))
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.5)  # how long torch waits for each


def process_ids(folder: Path) -> list[int]:
    return [int(path.name.partition("-")[2]) for path in folder.iterdir()]


@pytest.mark.timeout(240)
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


@pytest.mark.timeout(240)
def test_a_process_that_never_begins_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_still_at_first(monkeypatch, tmp_path, times=9)
    others = multiprocessing.active_children()
    with pytest.raises(ValueError, match=r"\b2 data loading processes.*\b1 s\b.*\b2 attempts"):
        iter(WorkerLoader(range(6), num_workers=2, batch_size=2))
    assert set(multiprocessing.active_children()) <= set(others)


STOPPABLE = """
import os, signal, sys, time
from pathlib import Path
import torch
from dist_proxygml.data import workers
from dist_proxygml.distributed.preemption import StopSignals

stood_still = Path(sys.argv[1])

def stand_still_at_first():
    if not stood_still.exists():
        stood_still.touch()
        while True:
            signal.pause()

signals = StopSignals()
signals.listen()
workers.SECONDS_TO_START = (1.0, 60.0)
torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.5
os.register_at_fork(after_in_child=stand_still_at_first)
assert len(list(workers.WorkerLoader(range(6), num_workers=1, batch_size=2))) == 3 and stood_still.exists()
signal.raise_signal(signal.SIGUSR2)
while signals.received is None:
    time.sleep(0.01)
print(signals.received.name)
"""


@pytest.mark.timeout(240)
def test_ending_a_process_that_stands_still_does_not_tell_its_starter_to_stop(tmp_path: Path) -> None:
    command = [sys.executable, "-c", STOPPABLE, str(tmp_path / "stood-still")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.stdout == "SIGUSR2\n", f"the first signal: {done.stdout + done.stderr}"


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    assert len(list(WorkerLoader(range(6), num_workers=0, batch_size=4))) == 2
    assert torch.equal(torch.get_rng_state(), before)


class TooLarge(torch.utils.data.Dataset[object]):
    """A sample for which there is no room in shared memory."""

    def __getitem__(self, number: int) -> object:
        images = torch.zeros(3)
        images.share_memory_ = no_room  # type: ignore[method-assign]
        try:
            return workers.ready_to_leave(images)
        except ValueError as problem:
            return str(problem)

    def __len__(self) -> int:
        return 1


def no_room() -> None:
    raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1_2>: No space left on device (28)")


def test_a_batch_without_room_in_shared_memory_is_an_error_and_no_wait() -> None:
    (told,) = WorkerLoader(TooLarge(), num_workers=1, batch_size=None)
    assert "/dev/shm is on the file system" in told
    assert torch.equal(workers.ready_to_leave(torch.zeros(3)), torch.zeros(3)), "outside there is nothing to leave"
