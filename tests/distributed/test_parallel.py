"""Ranks fail together, and only then; none waits for another longer than a collective may."""

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from dist_proxygml.distributed import parallel
from dist_proxygml.distributed.parallel import (
    ParallelContext,
    all_gather_object,
    parse_arguments,
    run_long,
    run_together,
    single_process,
)
from dist_proxygml.distributed.preemption import StopRequested
from tests.harness import run_ranks


def open_file(rank: int, failing: list[int]) -> str:
    if rank in failing:
        raise OSError(f"rank {rank} found no file")
    return f"file of rank {rank}"


def try_together(context: ParallelContext, failing: list[int]) -> str:
    try:
        return run_together(context, open_file, context.rank, failing)
    except ValueError as error:
        return f"refused: {error}"


def test_every_rank_gets_its_own_result_when_none_fails() -> None:
    assert run_ranks(try_together, 3, []) == ["file of rank 0", "file of rank 1", "file of rank 2"]


@pytest.mark.parametrize("failing", [[1], [2, 1], [0, 1, 2]])
def test_all_ranks_raise_the_error_of_the_lowest_failing_rank(failing: list[int]) -> None:
    first = min(failing)
    assert run_ranks(try_together, 3, failing) == [f"refused: rank {first} found no file (on rank {first})"] * 3


def test_one_process_raises_without_naming_a_rank() -> None:
    with pytest.raises(ValueError, match=r"^rank 0 found no file$"):
        run_together(single_process(), open_file, 0, [0])


def work_longer_than_a_collective_waits(context: ParallelContext, failing: list[int]) -> tuple[str, int]:
    """What `run_long` gives, and how often the ranks told each other that they were there."""
    signs = 0
    gather = parallel.gather_objects

    def counted(value: Any, *, group: Any) -> list[Any]:
        nonlocal signs
        signs += 1
        return gather(value, group=group)

    parallel.gather_objects = counted
    parallel._SECONDS_BETWEEN_SIGNS = 0.05
    waited = threading.Event()

    def work() -> str:
        while context.rank == 1 and signs < 5:
            waited.wait(0.01)
        return open_file(context.rank, failing)

    try:
        return run_long(context, work), signs
    except ValueError as error:
        return f"refused: {error}", signs


@pytest.mark.parametrize("failing", [[], [0]])
def test_while_one_rank_works_the_others_hear_of_it(failing: list[int]) -> None:
    told = run_ranks(work_longer_than_a_collective_waits, 2, failing)
    expected = (
        [f"file of rank {rank}" for rank in range(2)]
        if not failing
        else ["refused: rank 0 found no file (on rank 0)"] * 2
    )
    assert [text for text, _ in told] == expected
    assert told[0][1] == told[1][1] > 5


def stop_meanwhile(context: ParallelContext) -> str:
    parallel._SECONDS_BETWEEN_SIGNS = 0.05
    signs: list[int] = []

    def meanwhile() -> None:
        signs.append(len(signs))
        if len(signs) == 3:
            raise StopRequested({0: signal.SIGTERM})

    try:
        return run_long(context, threading.Event().wait, meanwhile=meanwhile) and "done"
    except StopRequested:
        return f"stopped after {len(signs)} signs"


def test_ranks_may_stop_while_the_work_goes_on() -> None:
    assert run_ranks(stop_meanwhile, 2) == ["stopped after 3 signs"] * 2


def ranks_seen(context: ParallelContext) -> list[int]:
    return all_gather_object(context, context.rank)


def test_everyone_is_in_rank_order() -> None:
    assert run_ranks(ranks_seen, 3) == [[0, 1, 2]] * 3


LAUNCHER = """
import atexit, sys
from dist_proxygml.distributed.collectives import AgreedError
from dist_proxygml.distributed.parallel import OneRankError, join_world, run_launcher

class Witness:
    def __del__(self):
        print("the interpreter ended", flush=True)

def main():
    global witness
    witness = Witness()
    atexit.register(print, "exit handlers ran")
    join_world()
    sys.stdout.write("last words ")
    {ending}

run_launcher(main)
"""


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("ending", "status", "message"),
    [
        ("pass", 0, ""),
        ("raise AgreedError('no such run')", 2, "error: no such run\n"),
        ("raise OneRankError('no GPU')", 2, "error: no GPU\n"),
        ("raise ValueError('a bug')", 1, "ValueError: a bug\n"),
        ("raise RuntimeError('a bug')", 1, "RuntimeError: a bug\n"),
        ("raise OSError(28, 'No space left on device')", 2, "make room or raise the quota (on rank 0)\n"),
        ("raise OSError(5, 'Input/output error')", 1, "OSError: [Errno 5] Input/output error\n"),
    ],
)
def test_a_launcher_leaves_with_a_sure_status_before_the_interpreter_ends(
    ending: str, status: int, message: str
) -> None:
    """The end of the interpreter kills gloo's threads within C++, which aborts a process that had finished."""
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHER.format(ending=ending)], capture_output=True, text=True, timeout=50, check=False
    )
    assert done.returncode == status, done.stderr
    assert done.stdout == "last words exit handlers ran\n"
    assert done.stderr.endswith(message)
    assert ("Traceback" in done.stderr) == (status == 1)


def test_a_port_that_another_program_holds_is_refused_with_the_way_to_another(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = str(holder.getsockname()[1])
        variables = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1"}
        for name, value in {**variables, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(parallel.OneRankError, match=rf"port {port}.*127\.0\.0\.1.*--master_port"):
            parallel.join_world()


@pytest.mark.parametrize(("rank", "said"), [("0", True), ("1", False)])
def test_a_mistake_in_the_command_line_is_printed_once_and_ends_every_rank(
    rank: str, said: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(sys, "argv", ["train.py", "--nothing"])
    with pytest.raises(SystemExit) as ending:
        parse_arguments(argparse.ArgumentParser())
    assert ending.value.code == 2
    assert ("--nothing" in capsys.readouterr().err) == said


def wait_for_a_rank_that_does_not_come(context: ParallelContext) -> tuple[str, float, float]:
    """What is said of it, seconds until then, and how long ranks wait once a run has started."""
    parallel._wait_at_most(timedelta(seconds=1))
    told, started = "", time.monotonic()
    if context.rank == 0:
        try:
            dist.new_group([0, 1])  # as DeepSpeed does, without a time-out of its own
        except RuntimeError as error:
            told = parallel._missing_peer(error) or ""
    seconds = time.monotonic() - started
    parallel.has_started()
    return told, seconds, dist.distributed_c10d.default_pg_timeout.total_seconds()


def test_a_wait_at_the_start_ends_soon_in_groups_of_libraries_too() -> None:
    (told, seconds, later), _ = run_ranks(wait_for_a_rank_that_does_not_come, 2)
    assert told.startswith("error: another rank has not come, has gone or does not answer, says rank 0, which")
    assert "waits 1 s at most while a run starts (training.start_timeout)" in told
    assert "\n" not in told
    assert seconds < 20
    assert later == 1800


ALONE = """
from dist_proxygml.distributed.parallel import join_world, run_launcher
run_launcher(lambda: join_world(start_timeout=1))
"""


@pytest.mark.timeout(240)
@pytest.mark.parametrize(("taken", "status"), [(False, 75), (True, 2)])
def test_a_rank_that_nobody_joins_says_so_in_one_line(taken: bool, status: int) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        if taken:
            listener.listen()
        else:
            listener.close()
        world = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        done = subprocess.run(
            [sys.executable, "-c", ALONE],
            env=os.environ | world,
            capture_output=True,
            text=True,
            timeout=50,
            check=False,
        )
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    assert ("--master_port" if taken else "training.start_timeout") in done.stderr.splitlines()[-1]


FULL_BOARD = """
import threading
from dist_proxygml.distributed.parallel import run_launcher

def main():
    def write():
        raise OSError(28, "No space left on device")
    thread = threading.Thread(target=write)  # as TensorBoard's, which hands its error to the main thread
    thread.start()
    thread.join()
    write()

run_launcher(main)
"""


@pytest.mark.timeout(240)
def test_a_thread_that_finds_the_disk_full_adds_no_traceback() -> None:
    done = subprocess.run([sys.executable, "-c", FULL_BOARD], capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: [Errno 28] No space left on device; ")
    assert done.stderr.count("\n") == 1
