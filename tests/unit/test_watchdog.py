"""The watchdog: it ends a process whose step does not end, and leaves the others alone."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dist_proxygml.distributed.watchdog import Watchdog

ROOT = Path(__file__).parents[2]

HANGING = """
import sys, threading
from pathlib import Path
from dist_proxygml.distributed.watchdog import Watchdog

def step_that_never_ends():
    threading.Event().wait()

watchdog = Watchdog(0.2, report=Path(sys.argv[1]))
watchdog.beat()
step_that_never_ends()
"""


@pytest.mark.timeout(240)
def test_a_step_that_does_not_end_ends_the_process_and_shows_where_it_was(tmp_path: Path) -> None:
    report = tmp_path / "hang.txt"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RANK": "3"}
    done = subprocess.run(
        [sys.executable, "-c", HANGING, str(report)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 75
    for text in (done.stderr, report.read_text()):
        assert "error: a step has taken longer than 0.2 s on rank 3" in text
        assert "in step_that_never_ends" in text
    assert "raise training.step_timeout" in done.stderr


@pytest.mark.timeout(240)
def test_a_file_system_that_hangs_does_not_keep_the_process(tmp_path: Path) -> None:
    report = tmp_path / "nobody-reads-this"
    os.mkfifo(report)
    program = HANGING.replace(
        "watchdog.beat()", "import dist_proxygml.distributed.watchdog as w; w._SECONDS_TO_TELL = 0.5; watchdog.beat()"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program, str(report)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 75
    assert "in step_that_never_ends" in done.stderr


@pytest.mark.timeout(240)
def test_beats_and_pauses_put_it_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bitten = threading.Event()
    monkeypatch.setattr(Watchdog, "_bite", lambda self: bitten.set())
    watchdog = Watchdog(0.3, report=tmp_path / "hang.txt")
    assert not bitten.wait(0.5), "nothing is watched before the first beat"
    for _ in range(6):
        watchdog.beat()
        assert not bitten.wait(0.1)
    with watchdog.paused():
        assert not bitten.wait(0.5)
    started = time.monotonic()
    assert bitten.wait(10), "the time starts anew after a pause"
    assert time.monotonic() - started > 0.2


def test_none_waits_for_ever(tmp_path: Path) -> None:
    watchdog = Watchdog(None, report=tmp_path / "hang.txt")
    before = threading.active_count()
    watchdog.beat()
    with watchdog.paused():
        pass
    watchdog.stop()
    assert threading.active_count() == before


STOPPED_CHILD = """
import multiprocessing, os, signal, sys
child = multiprocessing.get_context("fork").Process(target=signal.pause, daemon=True)
child.start()
os.kill(child.pid, signal.SIGSTOP)
os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WNOWAIT)
print(child.pid, flush=True)
"""


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("ending", "status"),
    [(HANGING, 75), ("from dist_proxygml.distributed.parallel import run_launcher; run_launcher(lambda: 0)", 0)],
)
def test_data_loading_processes_that_are_stopped_are_not_left_behind(tmp_path: Path, ending: str, status: int) -> None:
    command = [sys.executable, "-c", STOPPED_CHILD + ending, str(tmp_path / "hang.txt")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == status, done.stderr  # the pipe of its output has ended, which the child had open
    child = Path("/proc", done.stdout.strip(), "stat")
    assert not child.exists() or child.read_text().rpartition(")")[2].split()[0] == "Z"
