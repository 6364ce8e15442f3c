"""The parallel world: one small object, built once by a launcher, passed down.

Nothing else in the project asks torch.distributed who it is. `group` is None for a lone process, and every function
that takes a group accepts None, so the library runs without a process group as well.
"""

import argparse
import atexit
import contextlib
import multiprocessing
import os
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist

from dist_proxygml.cli import interrupted, outlive_readers, refuse
from dist_proxygml.distributed.collectives import AgreedError, gather_objects
from dist_proxygml.distributed.slurm import process_variables
from dist_proxygml.faults import fault_point
from dist_proxygml.storage.files import in_words, is_about_space

T = TypeVar("T")

STOPPED_STATUS = 75  # EX_TEMPFAIL of sysexits.h: start it again and it goes on
_SECONDS_BETWEEN_SIGNS = 15.0  # far below the time-out of a collective
_LONGEST_WAIT = timedelta(minutes=30)  # of one rank for another, once a run has started


class OneRankError(ValueError):
    """A user's mistake that this rank alone knows of, so this rank reports it."""


@dataclass(frozen=True)
class ParallelContext:
    """This process among its peers."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    group: dist.ProcessGroup | None

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that talks and writes."""
        return self.rank == 0


def single_process(device: str = "cpu") -> ParallelContext:
    """A world of one process, without a process group."""
    return ParallelContext(rank=0, world_size=1, local_rank=0, device=torch.device(device), group=None)


def join_world(*, start_timeout: float = 300.0) -> ParallelContext:
    """Start the process group that the launcher described in the environment (RANK, WORLD_SIZE, LOCAL_RANK,
    MASTER_ADDR, MASTER_PORT). Where srun is the launcher, its variables are brought into this form, for libraries too.

    Called on all ranks. NCCL on GPUs, gloo on CPUs. On CPUs the cores are shared out over this host's ranks unless
    OMP_NUM_THREADS says otherwise; left alone, every rank would start a thread per core.

    Args:
        start_timeout: seconds that a rank waits for others at a time, from here until `has_started` is called.

    Raises:
        ValueError: a rank has no GPU of its own although the host has GPUs.
        RuntimeError: another rank has not come; `run_launcher` says so in one line.
    """
    os.environ.update(process_variables(os.environ))
    rank = int(os.environ.get("RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise OneRankError(
                f"local rank {local_rank} has no GPU: expected at least {local_rank + 1} on this host, found "
                f"{torch.cuda.device_count()}; start fewer ranks per host"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        backend = "nccl"
    else:
        device = torch.device("cpu")
        backend = "gloo"
        if "OMP_NUM_THREADS" not in os.environ:
            local_world_size = int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or world_size)
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world_size))
    fault_point("start.join")
    timeout = timedelta(seconds=start_timeout)
    _wait_at_most(timeout)
    if "RANK" in os.environ:
        try:
            dist.init_process_group(backend, rank=rank, world_size=world_size, timeout=timeout)
        except dist.DistNetworkError as error:
            if "EADDRINUSE" not in str(error):
                raise
            port = os.environ.get("MASTER_PORT", "29500")
            raise OneRankError(
                f"expected port {port} of {os.environ.get('MASTER_ADDR')} to be free, where the ranks meet, got one "
                "that another program, such as another run, holds; wait for its end, or take another port, by "
                "--master_port of deepspeed or torchrun, else by the environment's MASTER_PORT"
            ) from None
    else:  # no launcher: a world of one needs no address, and so cannot find its port taken
        dist.init_process_group(backend, rank=0, world_size=1, store=dist.HashStore(), timeout=timeout)
    return ParallelContext(rank, world_size, local_rank, device, dist.group.WORLD)


def has_started() -> None:
    """From now on ranks wait for each other as long as work may take; until then `join_world` has their waits end soon.
    Called on all ranks.
    """
    if _is_starting():
        _wait_at_most(_LONGEST_WAIT)


def _is_starting() -> bool:
    return dist.is_initialized() and dist.distributed_c10d.default_pg_timeout < _LONGEST_WAIT


def _wait_at_most(timeout: timedelta) -> None:
    """How long this process waits for others at a time from now on: in its groups, at the store where ranks meet, and
    in groups that libraries make without saying, which would wait half an hour for a rank that was killed: there is no
    connection to it yet that could break.
    """
    c10d = dist.distributed_c10d
    c10d.default_pg_timeout = c10d.default_pg_nccl_timeout = timeout
    if dist.is_initialized():
        c10d._get_default_store().set_timeout(timeout)
        for group in list(c10d._world.pg_map):
            dist.set_timeout(timeout, group)


def _missing_peer(error: Exception) -> str | None:
    """What to say of an error while a run starts, if it is about ranks that are not there."""
    text = str(error).strip().partition("\n")[0]
    is_of_a_store = isinstance(error, dist.DistError) or "timeout" in text.lower()
    if not is_of_a_store and "gloo" not in text:
        return None
    rank, waits = os.environ.get("RANK", "0"), dist.distributed_c10d.default_pg_timeout.total_seconds()
    return (
        f"error: another rank has not come, has gone or does not answer, says rank {rank}, which waits {waits:g} s at "
        f"most while a run starts (training.start_timeout): {text[:200]}; look at that rank's log, then start again"
    )


def available_backends() -> list[str]:
    """Libraries that this build of torch lets ranks talk through, of the two that are used here."""
    if not dist.is_available():
        return []
    return [
        name for name, is_there in (("gloo", dist.is_gloo_available()), ("nccl", dist.is_nccl_available())) if is_there
    ]


def run_together(context: ParallelContext, function: Callable[..., T], *args: object) -> T:
    """Run `function(*args)` on every rank; if it raises a ValueError or OSError on any rank, raise on all of them.

    Called on all ranks. The message is that of the lowest failing rank, so that one rank may print it for all.
    `function` must not use collectives: its peers may already have failed.
    """
    result, failure = None, None
    try:
        result = function(*args)
    except (ValueError, OSError) as error:
        failure = in_words(error) if context.world_size == 1 else f"{in_words(error)} (on rank {context.rank})"
    failures = all_gather_object(context, failure)
    first = next((message for message in failures if message is not None), None)
    if first is not None:
        raise AgreedError(first)
    return result  # type: ignore[return-value]


def run_long(
    context: ParallelContext, function: Callable[..., T], *args: object, meanwhile: Callable[[], object] | None = None
) -> T:
    """As `run_together`, for what may take one rank hours: no rank may wait for another longer than a collective's
    time-out, so the function has a thread of its own, and meanwhile the ranks tell each other that they are there, and
    call `meanwhile`, which may use collectives and raise.
    """
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(function(*args))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, name="work", daemon=True).start()  # left behind when a peer has gone
    while not all(all_gather_object(context, bool(wait([future], timeout=_SECONDS_BETWEEN_SIGNS).done))):
        if meanwhile is not None:
            meanwhile()
    return run_together(context, future.result)


def all_gather_object(context: ParallelContext, value: T) -> list[T]:
    """The picklable `value` of every rank, in rank order. Called on all ranks."""
    return gather_objects(value, group=context.group)


def run_on_rank_zero_for_long(context: ParallelContext, function: Callable[..., T], *args: object) -> T:
    """As `run_on_rank_zero`, for what may take rank 0 longer than the others may wait at a time."""
    result = run_long(context, lambda: function(*args) if context.is_main else None)
    return all_gather_object(context, result)[0]  # type: ignore[return-value]


def run_on_rank_zero(context: ParallelContext, function: Callable[..., T], *args: object) -> T:
    """Run `function(*args)` on rank 0 and give every rank its result, or its error. Called on all ranks.

    For what one rank must decide or write; the result must be picklable.
    """
    result = run_together(context, lambda: function(*args) if context.is_main else None)
    return all_gather_object(context, result)[0]  # type: ignore[return-value]


def parse_arguments(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line of a launcher; what is wrong with it, or its help, is printed by rank 0 alone."""
    if os.environ.get("RANK", "0") == "0":
        return parser.parse_args(arguments)
    with (
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        contextlib.redirect_stderr(nowhere),
        contextlib.redirect_stdout(nowhere),
    ):
        return parser.parse_args(arguments)


def run_launcher(main: Callable[[], object]) -> NoReturn:
    """Run a launcher's body and end the process: status 0, 2 after a user's mistake, 130 after Ctrl-C, 1 after any
    other error, and that of an exception that brings its own (`status`): 65 where numbers stay NaN, 75 where the run
    was told to stop.

    What all ranks know is printed by rank 0: agreed errors, and whatever is wrong before the world is joined, where all
    ranks read the same. What one rank knows it prints itself. A launcher such as deepspeed then ends the other ranks.
    Any other error is ours and keeps its traceback.
    """
    os.environ.update(process_variables(os.environ))  # who is rank 0, also for what fails before the world is joined
    outlive_readers()
    threading.excepthook = _thread_ended
    try:
        status = status_of(main)
    except Exception:
        traceback.print_exc()
        status = 1
    _leave(status)


def status_of(main: Callable[[], object]) -> int:
    """The exit status of a launcher's body, when what is to be said of it is said. Our own errors are raised."""
    speaks = os.environ.get("RANK", "0") == "0"
    status = 0
    try:
        main()
    except KeyboardInterrupt:
        return interrupted("stopped") if speaks else 130
    except ValueError as error:
        is_shared = isinstance(error, AgreedError) or not dist.is_initialized()
        if not is_shared and not isinstance(error, OneRankError):
            raise
        if isinstance(error, OneRankError) or speaks:
            refuse(error)
        return int(getattr(error, "status", 2))
    except Exception as ending:
        if is_about_space(str(ending)):
            print(f"error: {in_words(ending)} (on rank {os.environ.get('RANK', '0')})", file=sys.stderr, flush=True)
            return 2
        is_early = isinstance(ending, RuntimeError) and (_is_starting() or not dist.is_initialized())
        if is_early and (told := _missing_peer(ending)):
            print(told, file=sys.stderr, flush=True)
            return STOPPED_STATUS
        if not hasattr(ending, "status"):
            raise
        status = int(ending.status)  # whoever raised it has said why
    if dist.is_initialized():
        dist.destroy_process_group()
    return status


def _thread_ended(ending: threading.ExceptHookArgs) -> None:
    """A full disk is told by the main thread, which comes to hear of it."""
    if not is_about_space(str(ending.exc_value)):
        threading.__excepthook__(ending)


def end_loading_processes() -> None:
    """End the processes that this one has started for its data, stopped ones, too: they would stay."""
    with contextlib.suppress(Exception):
        for process in multiprocessing.active_children():
            process.kill()


def _leave(status: int) -> NoReturn:
    """End the process as sys.exit does, but for the interpreter's own end.

    While the interpreter ends, CPython kills any thread that asks for its lock. A gloo thread asks for it to let go of
    a finished collective's tensors, inside C++ that must not be unwound, and takes the whole process with it:
    "terminate called without an active exception", status -6, after a run that was complete. Exit handlers run as ever.
    """
    end_loading_processes()  # one that is stopped would keep its exit handler waiting
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
