"""Signals to stop: taken while nothing else goes on, shared by all ranks, and no business of data loading processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from dist_proxygml.distributed.parallel import ParallelContext
from dist_proxygml.distributed.preemption import StopRequested, StopSignals, ignore_stop_signals
from tests.harness import run_ranks

ROOT = Path(__file__).parents[2]

# The main thread waits in C for a lock that it holds: no handler of Python's can run there.
HUNG = """
import ctypes, os, sys, threading, time
from dist_proxygml.distributed.preemption import StopSignals

def give_up():
    print("grace is over", signals.received.name, flush=True)
    os._exit(7)

signals = StopSignals(grace=float(sys.argv[1]) if sys.argv[1] else None, on_grace_over=give_up)
signals.listen()

def tell():
    while signals.received is None:
        time.sleep(0.01)
    print("noticed", flush=True)

threading.Thread(target=tell, daemon=True).start()
lock = ctypes.create_string_buffer(256)
libc = ctypes.CDLL(None)
libc.pthread_mutex_lock(lock)
print("hangs", flush=True)
libc.pthread_mutex_lock(lock)
"""


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("grace", "sent", "status", "output"),
    [
        ("", "TERM", 143, ""),
        ("0.2", "USR2", 7, "grace is over SIGUSR2"),
        ("60", "TERM", 143, ""),
    ],
)
def test_a_process_that_hangs_still_takes_its_signals(grace: str, sent: str, status: int, output: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HUNG, grace],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "hangs\n"
    started = time.monotonic()
    process.send_signal(getattr(signal, f"SIG{sent}"))
    assert process.stdout.readline() == "noticed\n"
    while status == 143 and process.poll() is None:
        process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
    assert process.stdout.read().strip() == output
    assert process.wait(timeout=20) == status
    assert status != 143 or time.monotonic() - started > 1.0, "a launcher's own SIGTERM is no second one"


@pytest.mark.timeout(240)
def test_later_signals_give_no_more_time() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HUNG, "0.4"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "hangs\n"
    deadline = time.monotonic() + 20
    while process.poll() is None and time.monotonic() < deadline:
        process.send_signal(signal.SIGUSR1)
        time.sleep(0.05)
    process.kill()
    assert process.wait() == 7, "it would wait as long as signals come"


def told_to_stop(context: ParallelContext, signalled: dict[int, list[str]]) -> str | None:
    signals = StopSignals()
    signals.listen()
    for name in signalled.get(context.rank, []):
        before = signals.received
        os.kill(os.getpid(), getattr(signal, f"SIG{name}"))
        while signals.received is None and before is None:
            pass
    try:
        signals.agree(context)
    except StopRequested as stop:
        return f"{stop} {stop.status}"
    return None


@pytest.mark.timeout(240)
def test_one_rank_is_enough_and_all_learn_of_its_first_signal() -> None:
    assert run_ranks(told_to_stop, 3, {1: ["USR2", "USR1"]}) == ["SIGUSR2 (on rank 1) 75"] * 3
    both = "SIGTERM (on rank 0), SIGUSR1 (on rank 2) 75"
    assert run_ranks(told_to_stop, 3, {0: ["TERM"], 2: ["USR1"]}) == [both] * 3
    assert run_ranks(told_to_stop, 2, {}) == [None, None]


class SignalledImages(Dataset[int]):
    """Sends itself every signal while it works."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, number: int) -> int:
        for name in ("TERM", "USR1", "USR2"):
            os.kill(os.getpid(), getattr(signal, f"SIG{name}"))
        return number


@pytest.mark.timeout(240)
def test_data_loading_processes_go_on() -> None:
    loader = DataLoader(SignalledImages(), num_workers=1, worker_init_fn=ignore_stop_signals, batch_size=None)
    assert torch.tensor(list(loader)).tolist() == [0, 1, 2]


LEFT_IN_USE = """
from torch.utils.data import DataLoader
from dist_proxygml.distributed.preemption import ignore_stop_signals

batches = iter(DataLoader(range(1000), num_workers=2, worker_init_fn=ignore_stop_signals))
next(batches)
print("leaves", flush=True)
"""


@pytest.mark.timeout(240)
def test_a_process_with_a_loader_in_use_can_leave() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", LEFT_IN_USE], capture_output=True, text=True, env=environment, timeout=50, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "leaves\n", "")
