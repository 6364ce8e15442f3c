"""Runs one function on several gloo ranks of this machine and hands back what each rank returned; or a command.

Chosen: a fork server that has the libraries loaded, so that four ranks start in a fraction of a second
after a one-off few seconds; a file as rendezvous, so that no port can be taken; results travel as
bytes, so that no rank shares memory or file descriptors with the test. Declined:
`torch.multiprocessing.spawn`, which imports torch once for every rank of every test; preloading the
package under test, which would hide what its import does.

    def sum_of_ranks(context: ParallelContext, start: float) -> float: ...   # top level of a module
    assert run_ranks(sum_of_ranks, 3, 0.5) == [3.5, 3.5, 3.5]

Either every rank returns, or the error of the rank that failed first is raised here. All ranks have
ended when `run_ranks` returns or raises.

    done = run_command("launchers/train.py", "--config", CONFIG, num_ranks=2)   # returncode, stdout, stderr

is what `deepspeed --num_gpus 2 launchers/train.py --config ...` does, without 20 seconds of imports.
"""

import builtins
import datetime
import functools
import io
import math
import multiprocessing
import os
import pickle
import runpy
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")

# What takes long to import; the first optimizer that a process builds loads `torch._dynamo`.
PRELOADED_MODULES = ["torch", "torch.distributed", "torch._dynamo", "numpy", "pytest", "deepspeed", "faiss"]
PRELOADED_MODULES += ["sklearn.metrics", "torchvision", "timm"]


class Report(NamedTuple):
    """What a rank tells the test: its result (None: none) and the error that ended it."""

    rank: int
    finished_at: float  # seconds of the machine's monotonic clock, the same for all processes
    result: bytes | None
    error_type: str = ""
    error_message: str = ""
    traceback_text: str = ""


def run_ranks(function: Callable[..., T], world_size: int, *args: Any, timeout: float = 60.0) -> list[T]:
    """Call `function(context, *args)` on `world_size` gloo ranks; the results in rank order.

    `function`, what it takes and what it returns must be picklable: a function at the top level of
    a module. Each rank has a real process group (also when `world_size` is 1) and one thread.

    Raises:
        The error of the rank that failed first, with the rank and its traceback in the message; of
        the same type where that is a built-in one, RuntimeError otherwise. TimeoutError when a rank
        has not returned after `timeout` seconds.
    """
    context = _fork_server()
    arguments = _to_bytes(args)
    processes: list[Any] = []
    connections: list[Connection] = []
    with tempfile.TemporaryDirectory(prefix="ranks-") as directory:
        try:
            for rank in range(world_size):
                connection, connection_of_rank = context.Pipe()
                process = context.Process(
                    target=_run_rank,
                    args=(function, arguments, rank, world_size, directory, timeout),
                    kwargs={"connection": connection_of_rank},
                    name=f"rank-{rank}",
                    daemon=True,
                )
                process.start()
                connection_of_rank.close()  # or the end of the rank would not end its pipe
                processes.append(process)
                connections.append(connection)
            results = _collect(processes, connections, timeout=timeout)
            for connection in connections:
                connection.send_bytes(b"end")
            for process in processes:
                process.join(timeout=10.0)
            return results
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.join()
                process.close()
            for connection in connections:
                connection.close()


def run_command(
    program: str, *arguments: str, num_ranks: int = 1, timeout: float = 60.0, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a file of Python, such as `launchers/train.py`, as the main program of so many processes, from the root.

    Each sees this process's environment, but OMP_NUM_THREADS, with `variables`, and several ranks what a launcher tells
    them; no launcher ends them: they end by themselves. Status: the first that is not 0; output: that of all ranks.

    Raises:
        TimeoutError when one has not ended after `timeout` seconds; all are killed.
    """
    context = _fork_server()
    with tempfile.TemporaryDirectory(prefix="command-") as directory:
        texts = [Path(directory, name) for name in ("stdout", "stderr")]
        environment = {name: os.environ[name] for name in os.environ if name != "OMP_NUM_THREADS"} | variables
        if num_ranks > 1:
            environment |= {"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks)}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        processes = []
        for rank in range(num_ranks):
            told = environment | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if num_ranks > 1 else {})
            processes.append(context.Process(target=_run_command, args=([program, *arguments], told, texts)))
        try:
            for process in processes:
                process.start()
            deadline = time.monotonic() + timeout
            for process in processes:
                process.join(max(0.0, deadline - time.monotonic()))
            out, err = (path.read_text(errors="replace") for path in texts)
            statuses = [process.exitcode for process in processes]
            if None in statuses:
                raise TimeoutError(f"{program} had not ended after {timeout:g} s: {statuses}\n{out}{err}")
        finally:
            for process in processes:
                if process.pid is not None:
                    process.kill()
                    process.join()
                process.close()
        status = next((status for status in statuses if status), 0)
        return subprocess.CompletedProcess([program, *arguments], int(status or 0), out, err)


def _run_command(command: list[str], environment: dict[str, str], texts: list[Path]) -> None:
    os.setpgid(0, 0)
    for descriptor, path in enumerate(texts, 1):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    multiprocessing.set_start_method("fork", force=True)  # of data loading processes, as in any other process
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(Path(__file__).parents[1])
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", len(os.sched_getaffinity(0)))))
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


def free_port() -> int:
    """A port of this machine that nobody listens at, where ranks may meet; no two runs of the tests share it."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@functools.cache
def _fork_server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED_MODULES)
    return context


def _collect(processes: list[Any], connections: list[Connection], *, timeout: float) -> list[Any]:
    """Wait for one report of every rank; raise for the first failure without waiting for all."""
    deadline = time.monotonic() + timeout
    reports: dict[int, Report] = {}
    failures: list[Report] = []
    while len(reports) < len(processes):
        waiting = [c for rank, c in enumerate(connections) if rank not in reports]
        patience = max(0.0, deadline - time.monotonic())
        # A rank that dies is missed by its peers before its own pipe is seen to close.
        ready = wait(waiting, timeout=min(1.0, patience) if failures else patience)
        if not ready and failures:
            break
        if not ready:
            missing = [rank for rank in range(len(processes)) if rank not in reports]
            raise TimeoutError(f"ranks {missing} had not returned after {timeout:g} s; all ranks were killed")
        for connection in ready:
            rank = connections.index(connection)  # type: ignore[arg-type]
            reports[rank] = _receive(rank, processes[rank], connections[rank])
        failures = [report for report in reports.values() if report.result is None]
    if failures:  # the earliest: the others usually report only that a peer went away
        raise _as_error(min(failures, key=lambda report: (report.finished_at, report.rank)))
    return [_from_bytes(reports[rank].result) for rank in range(len(processes))]


def _receive(rank: int, process: Any, connection: Connection) -> Report:
    try:
        return pickle.loads(connection.recv_bytes())
    except EOFError:
        process.join(timeout=10.0)
        message = f"the process ended with exit code {process.exitcode} and returned nothing"
        return Report(rank, -math.inf, None, "RuntimeError", message)  # no peer is the reason of that


def _as_error(report: Report) -> BaseException:
    message = f"rank {report.rank}: {report.error_type}: {report.error_message}\n{report.traceback_text}"
    error_type = getattr(builtins, report.error_type, RuntimeError)
    try:
        return error_type(message)
    except TypeError:  # some built-in errors take other arguments
        return RuntimeError(message)


def _run_rank(
    function: Callable[..., Any],
    arguments: bytes,
    rank: int,
    world_size: int,
    directory: str,
    timeout: float,
    *,
    connection: Connection,
) -> None:
    """Runs in the rank's process: join the group, call the function, report, leave last."""
    try:
        torch.set_num_threads(1)
        # The name of the host may not resolve on a bare machine; gloo would look it up.
        if any(name == "lo" for _, name in socket.if_nameindex()):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group(
            "gloo",
            init_method=f"file://{Path(directory) / 'rendezvous'}",
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=timeout),
        )
        from dist_proxygml.distributed.parallel import ParallelContext

        context = ParallelContext(
            rank=rank,
            world_size=world_size,
            local_rank=rank,
            device=torch.device("cpu"),
            group=dist.group.WORLD,
        )
        result = _to_bytes(function(context, *_from_bytes(arguments)))
        report = Report(rank, time.monotonic(), result)
    except BaseException as error:
        text = traceback.format_exc()
        # the built-in type that it is: one of the package's own could not be raised by name in the test
        kind = next(base.__name__ for base in type(error).__mro__ if base.__module__ == "builtins")
        report = Report(rank, time.monotonic(), None, kind, str(error), text)
    connection.send_bytes(pickle.dumps(report))
    try:
        connection.recv_bytes()  # leaving early would break a collective that others are still in
    except EOFError:
        return
    dist.destroy_process_group()


def _to_bytes(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _from_bytes(data: bytes | None) -> Any:
    assert data is not None
    return torch.load(io.BytesIO(data), weights_only=False)
