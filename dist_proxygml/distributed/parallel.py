"""The parallel world: one small object, built once by a launcher and passed down.

Nothing else in the project queries torch.distributed for its rank. `group` is None for a single process, and every
function that takes a group accepts None, so the library also runs without a process group.
"""

import argparse
import atexit
import contextlib
import json
import multiprocessing
import os
import socket
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from datetime import timedelta
from fractions import Fraction
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist

from dist_proxygml.cli import interrupted, outlive_readers, refuse
from dist_proxygml.distributed.collectives import AgreedError, gather_objects
from dist_proxygml.distributed.gpus import check_gpus, local_gpu, shared_gpus, start_thread
from dist_proxygml.distributed.slurm import process_variables
from dist_proxygml.faults import fault_point
from dist_proxygml.storage.files import describe_error, is_about_space

T = TypeVar("T")

STOPPED_STATUS = 75  # EX_TEMPFAIL of sysexits.h: start it again and it resumes
_SECONDS_BETWEEN_SIGNS = 15.0  # far below the time-out of a collective
_LONGEST_WAIT = timedelta(minutes=30)  # between ranks, once a run has started


class OneRankError(ValueError):
    """A user's mistake that only this rank knows of, so this rank reports it."""


class LostPeerError(OneRankError):
    """Another rank has gone in the middle of work that the same command resumes."""

    status = STOPPED_STATUS


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
        """Whether this is rank 0, which prints and writes."""
        return self.rank == 0


def single_process(device: str = "cpu") -> ParallelContext:
    """Return a world of one process, without a process group."""
    return ParallelContext(rank=0, world_size=1, local_rank=0, device=torch.device(device), group=None)


def join_world(*, start_timeout: float = 300.0, device: str = "auto") -> ParallelContext:
    """Start the process group that the launcher described in the environment (RANK, WORLD_SIZE, LOCAL_RANK,
    MASTER_ADDR, MASTER_PORT). Under srun, its variables are converted to this form, for libraries too.

    Called on all ranks. NCCL on GPUs, gloo on CPUs. Cores are divided among the ranks that may use them unless
    OMP_NUM_THREADS is set; otherwise every rank would start a thread per core.

    Args:
        start_timeout: seconds that each wait for other ranks may take, from here until `has_started` is called.
        device: "cpu" to leave GPUs alone, "cuda" to insist on them; "auto" takes those that are there.

    Raises:
        ValueError: there are GPUs that torch cannot use, none where they are insisted on, or fewer than ranks.
    """
    os.environ.update(process_variables(os.environ))
    rank = int(os.environ.get("RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    own_device, backend = torch.device("cpu"), "gloo"
    if device == "cuda" or (device == "auto" and os.environ.get("DS_ACCELERATOR") != "cpu"):
        try:
            check_gpus(os.environ, are_needed=device == "cuda")
            if torch.cuda.is_available():
                own_device, backend = torch.device("cuda", local_gpu(local_rank)), "nccl"
        except ValueError as error:
            raise OneRankError(f"{error} (on rank {rank}, host {socket.gethostname()})") from None
    if own_device.type == "cuda":
        os.environ["LOCAL_RANK"] = str(own_device.index)  # which DeepSpeed takes for the GPU's number
        torch.cuda.set_device(own_device)
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
                f"expected the rendezvous port {port} of {os.environ.get('MASTER_ADDR')} to be free, got one "
                "that another program, such as another run, holds; wait for its end, or take another port, by "
                "--master_port of deepspeed or torchrun, else by the environment's MASTER_PORT"
            ) from None
    else:  # no launcher: a world of one needs no address, so its port cannot be taken
        dist.init_process_group(backend, rank=0, world_size=1, store=dist.HashStore(), timeout=timeout)
    _meet_neighbours(rank, world_size, own_device)
    return ParallelContext(rank, world_size, local_rank, own_device, dist.group.WORLD)


def _meet_neighbours(rank: int, world_size: int, device: torch.device) -> None:
    """Refuse ranks that share a GPU, and set the number of threads by who shares the cores. Called on all ranks.

    Through the rendezvous store: NCCL fails on two ranks of one GPU.
    """
    host, cores = socket.gethostname(), sorted(os.sched_getaffinity(0))
    gpu = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None
    store = dist.distributed_c10d._get_default_store()
    store.set(f"dist_proxygml/rank {rank}", json.dumps([host, gpu, cores]))
    ranks = [json.loads(store.get(f"dist_proxygml/rank {other}")) for other in range(world_size)]
    if problem := shared_gpus([(name, number) for name, number, _ in ranks if number is not None]):
        raise AgreedError(problem)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(fair_threads(cores, [others for name, _, others in ranks if name == host]))


def fair_threads(own: Sequence[int], of_host: Sequence[Sequence[int]]) -> int:
    """Return a rank's threads where each core is shared by those ranks of its host that may use it, itself included:
    all of them under most launchers, one where SLURM binds tasks to cores.
    """
    sharing = Counter(core for cores in of_host for core in cores)
    return max(1, int(sum(Fraction(1, sharing[core]) for core in own)))


def has_started() -> None:
    """Raise the time-out of waits between ranks from that of the start to that of a run. Called on all ranks."""
    if _is_starting():
        _wait_at_most(_LONGEST_WAIT)


def _is_starting() -> bool:
    return dist.is_initialized() and dist.distributed_c10d.default_pg_timeout < _LONGEST_WAIT


def _wait_at_most(timeout: timedelta) -> None:
    """Set the time-out of this process's waits: in its groups, at the rendezvous store, and in groups that libraries
    create with the default, which would wait half an hour for a rank that was killed before it connected.
    """
    c10d = dist.distributed_c10d
    c10d.default_pg_timeout = c10d.default_pg_nccl_timeout = timeout
    if dist.is_initialized():
        c10d._get_default_store().set_timeout(timeout)
        for group in list(c10d._world.pg_map):
            dist.set_timeout(timeout, group)


def peer_problem(error: Exception) -> str | None:
    """Return what an error says, if it is about ranks that do not come, have gone or do not answer."""
    text = str(error).strip().partition("\n")[0]
    is_of_a_store = isinstance(error, dist.DistError) or "timeout" in text.lower()
    return text[:200] if is_of_a_store or "gloo" in text else None


def _missing_peer(error: Exception) -> str | None:
    """Return a message for an error during the start of a run, if it is about missing ranks."""
    text = peer_problem(error)
    if text is None:
        return None
    rank, waits = os.environ.get("RANK", "0"), dist.distributed_c10d.default_pg_timeout.total_seconds()
    return (
        f"error: another rank has not come, has gone or does not answer, says rank {rank}, which waits {waits:g} s at "
        f"most while a run starts (training.start_timeout): {text}; look at that rank's log, then start again"
    )


def available_backends() -> list[str]:
    """List the available communication libraries of this build of torch, of the two used here."""
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
        failure = (
            describe_error(error) if context.world_size == 1 else f"{describe_error(error)} (on rank {context.rank})"
        )
    failures = all_gather_object(context, failure)
    first = next((message for message in failures if message is not None), None)
    if first is not None:
        raise AgreedError(first)
    return result  # type: ignore[return-value]


def run_long(
    context: ParallelContext, function: Callable[..., T], *args: object, meanwhile: Callable[[], object] | None = None
) -> T:
    """Run as `run_together` does, for work that may take a rank hours: since no rank may wait for another longer than a
    collective's time-out, the function runs in a thread, while the ranks exchange heartbeats and call `meanwhile`,
    which may use collectives and raise.
    """
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(function(*args))
        except BaseException as error:
            future.set_exception(error)

    start_thread("work", work)  # abandoned if a peer has gone
    while not all(all_gather_object(context, bool(wait([future], timeout=_SECONDS_BETWEEN_SIGNS).done))):
        if meanwhile is not None:
            meanwhile()
    return run_together(context, future.result)


def all_gather_object(context: ParallelContext, value: T) -> list[T]:
    """Gather the picklable `value` of every rank, in rank order. Called on all ranks."""
    return gather_objects(value, group=context.group)


def run_on_rank_zero_for_long(context: ParallelContext, function: Callable[..., T], *args: object) -> T:
    """Run as `run_on_rank_zero` does, for work that may take longer than a collective's time-out, such as hashing a
    checkpoint.
    """
    result = run_long(context, lambda: function(*args) if context.is_main else None)
    return all_gather_object(context, result)[0]  # type: ignore[return-value]


def run_on_rank_zero(context: ParallelContext, function: Callable[..., T], *args: object) -> T:
    """Run `function(*args)` on rank 0 and give every rank its result, or its error. Called on all ranks.

    For decisions or files of a single rank; the result must be picklable.
    """
    result = run_together(context, lambda: function(*args) if context.is_main else None)
    return all_gather_object(context, result)[0]  # type: ignore[return-value]


def parse_arguments(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a launcher's command line; only rank 0 prints errors and help."""
    if os.environ.get("RANK", "0") == "0":
        return parser.parse_args(arguments)
    with (
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        contextlib.redirect_stderr(nowhere),
        contextlib.redirect_stdout(nowhere),
    ):
        return parser.parse_args(arguments)


def run_launcher(main: Callable[[], object], *, stopped: str = "stopped") -> NoReturn:
    """Run a launcher's body and end the process: status 0, 2 after a user's mistake, 130 after Ctrl-C, 1 after any
    other error, or the exception's own `status`: 65 if numbers stay NaN, 75 if the run was asked to stop. `stopped` is
    said after Ctrl-C.

    Rank 0 prints what all ranks know: agreed errors, and any error before the world is joined, since all ranks read the
    same input. A rank prints what it alone knows. A launcher such as deepspeed then ends the other ranks. Any other
    error is ours and keeps its traceback.
    """
    os.environ.update(process_variables(os.environ))  # the rank, also for failures before the world is joined
    outlive_readers()
    threading.excepthook = _thread_ended
    try:
        status = status_of(main, stopped=stopped)
    except Exception:
        traceback.print_exc()
        status = 1
    _leave(status)


def status_of(main: Callable[[], object], *, stopped: str = "stopped") -> int:
    """Exit status of a launcher's body, after its messages have been printed. Our own errors are raised."""
    speaks = os.environ.get("RANK", "0") == "0"
    status = 0
    try:
        main()
    except KeyboardInterrupt:
        return interrupted(stopped) if speaks else 130
    except ValueError as error:
        is_shared = isinstance(error, AgreedError) or not dist.is_initialized()
        if not is_shared and not isinstance(error, OneRankError):
            raise
        if isinstance(error, OneRankError) or speaks:
            refuse(error)
        return int(getattr(error, "status", 2))
    except Exception as ending:
        if is_about_space(str(ending)):
            print(
                f"error: {describe_error(ending)} (on rank {os.environ.get('RANK', '0')})", file=sys.stderr, flush=True
            )
            return 2
        is_early = isinstance(ending, RuntimeError) and (_is_starting() or not dist.is_initialized())
        if is_early and (message := _missing_peer(ending)):
            print(message, file=sys.stderr, flush=True)
            return STOPPED_STATUS
        if not hasattr(ending, "status"):
            raise
        status = int(ending.status)  # whoever raised it has printed the reason
    if dist.is_initialized():
        dist.destroy_process_group()
    return status


def _thread_ended(ending: threading.ExceptHookArgs) -> None:
    """Leave a full disk to the main thread, which reports it."""
    if not is_about_space(str(ending.exc_value)):
        threading.__excepthook__(ending)


def end_loading_processes() -> None:
    """End this process's data loading processes, also suspended ones, which would otherwise stay."""
    with contextlib.suppress(Exception):
        for process in multiprocessing.active_children():
            process.kill()


def _leave(status: int) -> NoReturn:
    """End the process as sys.exit does, but without finalising the interpreter.

    During finalisation, CPython kills any thread that requests the GIL. A gloo thread requests it to release a finished
    collective's tensors, inside C++ that must not be unwound, which aborts the process ("terminate called without an
    active exception", status -6) after a complete run. Exit handlers still run.
    """
    end_loading_processes()  # the exit handler would wait for a suspended one
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
