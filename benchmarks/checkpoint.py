"""What checkpoints cost: saving and loading a large bank beside the disk itself, and their share of training time.

    python -m benchmarks.checkpoint                                1,000,000 x 128 with Adam (1.5 GB); 3 x 300 steps
    python -m benchmarks.checkpoint --num-classes 1000 --embedding-dim 8 --steps 4 --every 2 --repeats 1

**bank**: gloo ranks of one thread each save and load a bank, in turn with the disk:

    write      rank 0 alone: as many bytes, one file, one after the other, then fsync
    save       `CheckpointWriter.save` to its return: the checkpoint is on disk, hashed and published
    read       rank 0 alone: the written file, one block after the other
    load       verifying every hash, as at a start with --resume auto, and reading the numbers into the bank
    of which verify

Before read and verify the files leave the page cache (POSIX_FADV_DONTNEED after they are on disk), so both come from
the disk, or from what lies beneath a virtual one. Every other round goes the other way round, save before write and
verify before read: the host of a virtual machine takes back memory that is free, so that the first to fill the page
cache may pay several times as much as the next. Rates are bytes of the bank and its moments over seconds, medians over
the rounds; `of disk` is the ratio of the medians.

**training**: the configuration, its images and DeepSpeed on two ranks; stretches of steps without checkpoints, with
synchronous and with asynchronous ones in turn. `blocked` is the time inside the calls, `slower` what the steps that
were done while one was written took beyond the median of those without, both as shares of the stretch's time.
"""

import argparse
import json
import os
import shutil
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor, nn

from benchmarks.head import Row, Settings, fork_server, machine, number, rounded
from dist_proxygml import ProxyGMLLoss
from dist_proxygml.checkpoint.folder import Retention, RunState, checkpoint_to_continue
from dist_proxygml.checkpoint.writer import CheckpointWriter, load_checkpoint
from dist_proxygml.config import load_config
from dist_proxygml.data.pipeline import Batch, ImageCache
from dist_proxygml.distributed.parallel import ParallelContext, all_gather_object
from dist_proxygml.training.data import open_training_data
from dist_proxygml.training.step import TrainState, build_train_state, train_step

DISK_BAR = 0.5  # of the disk's own rates
TRAINING_BAR = 0.02  # of the time, asynchronously
BLOCK = 1 << 24
WAYS = ("none", "synchronous", "asynchronous")


class Case(NamedTuple):
    """What the ranks of one process group do."""

    folder: Path
    num_classes: int
    embedding_dim: int
    repeats: int
    config: Path
    steps: int
    every: int


def main() -> None:
    """Measure the bank on every number of ranks, then training."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-classes", type=int, default=1_000_000, help="C over all ranks")
    parser.add_argument("--embedding-dim", type=int, default=128, help="D")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of ranks that save the bank")
    parser.add_argument(
        "--repeats", type=int, default=4, help="rounds that count, an even number; one more goes before"
    )
    parser.add_argument("--config", type=Path, default=Path("configs/demo_cpu.json"), help="what is trained")
    parser.add_argument("--steps", type=int, default=300, help="of a stretch; 0 leaves training out")
    parser.add_argument("--every", type=int, default=100, help="steps between checkpoints")
    parser.add_argument("--folder", type=Path, help="where to write (default: the temporary folder)")
    parser.add_argument("--json", type=Path, help="file for the JSON lines as well")
    arguments = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        case = Case(
            Path(folder),
            arguments.num_classes,
            arguments.embedding_dim,
            arguments.repeats,
            arguments.config,
            arguments.steps,
            arguments.every,
        )
        for world_size in arguments.ranks:
            rows += on_ranks(measure_bank, world_size, case)
        print_bank(rows)
        if case.steps:
            rows += on_ranks(measure_training, 2, case)
            print_training([row for row in rows if row["part"] == "training"])
    print()
    for line in bars(rows):
        print(line)
    print()
    lines = [json.dumps(rounded({**row, **machine(Settings(case.repeats, 1, "cpu"))})) for row in rows]
    print("\n".join(lines))
    if arguments.json is not None:
        arguments.json.write_text("\n".join(lines) + "\n")


def on_ranks(measure: Callable[[ParallelContext, Case], list[Row]], world_size: int, case: Case) -> list[Row]:
    """The rows of rank 0."""
    fork_server()  # what takes long to import is loaded there, once
    place = Path(tempfile.mkdtemp(dir=case.folder))
    multiprocessing.start_processes(
        run_rank,
        (measure, case._replace(folder=place), world_size),
        nprocs=world_size,
        join=True,
        start_method="forkserver",
    )
    return json.loads((place / "rows.json").read_text())


def run_rank(rank: int, measure: Callable[[ParallelContext, Case], list[Row]], case: Case, world_size: int) -> None:
    """One rank; rank 0 writes the rows."""
    torch.set_num_threads(1)
    if any(name == "lo" for _, name in socket.if_nameindex()):  # the host's own name may not resolve
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    rendezvous = f"file://{case.folder}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
    rows = measure(ParallelContext(rank, world_size, rank, torch.device("cpu"), dist.group.WORLD), case)
    if rank == 0:
        (case.folder / "rows.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


# ---- the bank --------------------------------------------------------------------------------------------------------


class NoBackbone:
    """What a checkpoint asks of an engine: nothing to save."""

    zero_stage = 0
    module = nn.Identity()
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))])

    def save(self, directory: Path) -> None:
        """Nothing."""

    def load(self, directory: Path) -> None:
        """Nothing."""

    def full_state_dict(self) -> dict[str, Tensor]:
        """A number."""
        return {"weight": torch.zeros(1)}


def measure_bank(context: ParallelContext, case: Case) -> list[Row]:
    """Seconds of every way, by round."""
    loss, new_loss = bank(context, case), bank(context, case)
    optimizer = torch.optim.Adam(loss.parameters(), fused=True)
    adam = optimizer.state[loss.proxies]
    adam |= {"step": torch.tensor(1.0)}
    adam |= {"exp_avg": torch.randn_like(loss.proxies), "exp_avg_sq": torch.rand_like(loss.proxies)}
    own = [loss.proxies.detach(), adam["exp_avg"], adam["exp_avg_sq"]]
    num_bytes = sum(all_gather_object(context, sum(tensor.nbytes for tensor in own)))
    times: dict[str, list[float]] = {way: [] for way in ("write", "save", "read", "load", "verify")}
    checkpoints, file = case.folder / "checkpoints", case.folder / "file"
    writer = CheckpointWriter(checkpoints, context, Retention(1))
    run = RunState(1, 0, 1, context.world_size, {})
    write, read = partial(write_plainly, file, own, num_bytes), partial(read_plainly, file)
    save = partial(writer.save, state=run, engine=NoBackbone(), loss=loss, bank_optimizer=optimizer)
    verify = partial(checkpoint_to_continue, checkpoints, "auto")
    for turn in range(case.repeats + 1):
        order = 1 if turn % 2 else -1
        for way, function in (("write", write), ("save", save))[::order]:
            times[way].append(timed(context, function, run_on_rank_zero=way == "write"))
        if context.is_main:
            leave_page_cache(case.folder)
        for way, function in (("read", read), ("verify", verify))[::order]:
            times[way].append(timed(context, function, run_on_rank_zero=True))
        new_loss.proxies.data.zero_()
        new_optimizer = torch.optim.Adam(new_loss.parameters(), fused=True)
        load = partial(load_checkpoint, engine=NoBackbone(), loss=new_loss, bank_optimizer=new_optimizer)
        seconds = timed(context, partial(load, checkpoints / "step-000001", context=context, settings={}))
        times["load"].append(times["verify"][-1] + seconds)
        assert torch.equal(new_loss.proxies, loss.proxies)
        assert torch.equal(new_optimizer.state[new_loss.proxies]["exp_avg_sq"], adam["exp_avg_sq"])
        del new_optimizer, load
        if context.is_main:
            file.unlink()
            shutil.rmtree(checkpoints)
            os.sync()
    row: Row = {
        "part": "bank",
        "ranks": context.world_size,
        "num_classes": case.num_classes,
        "embedding_dim": case.embedding_dim,
        "bytes": num_bytes,
        "rounds": case.repeats,
    }
    for way, seconds in times.items():
        row[f"{way}_s"] = statistics.median(seconds[1:])
        row[f"{way}_mb_s"] = num_bytes / 1e6 / row[f"{way}_s"]
    for way, plain in (("save", "write"), ("load", "read")):
        row[f"{way}_of_disk"] = row[f"{plain}_s"] / row[f"{way}_s"]
    return [row]


def bank(context: ParallelContext, case: Case) -> ProxyGMLLoss:
    """A bank of random proxies."""
    return ProxyGMLLoss(case.num_classes, case.embedding_dim, topk=8, group=context.group, seed=0)


def timed(context: ParallelContext, way: Callable[[], object], *, run_on_rank_zero: bool = False) -> float:
    """Seconds until all ranks are done with it, or until rank 0 is that does it alone."""
    dist.barrier(context.group)
    start = time.perf_counter()
    if context.is_main or not run_on_rank_zero:
        way()
    dist.barrier(context.group)
    return time.perf_counter() - start


def write_plainly(path: Path, tensors: list[Tensor], num_bytes: int) -> None:
    """As many bytes, of the tensors again and again, one block after the other, and on disk in the end."""
    views = [memoryview(tensor.numpy()).cast("B") for tensor in tensors]
    with open(path, "wb", buffering=0) as stream:
        while num_bytes:
            for view in views:
                for start in range(0, min(len(view), num_bytes), BLOCK):
                    num_bytes -= stream.write(view[start : start + min(BLOCK, num_bytes)])
        os.fsync(stream.fileno())


def read_plainly(path: Path) -> None:
    """Every block of the file."""
    block = bytearray(BLOCK)
    with open(path, "rb", buffering=0) as stream:
        while stream.readinto(block):
            pass


def leave_page_cache(folder: Path) -> None:
    """Drop what the system remembers of the files below, all of which are on disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def print_bank(rows: list[Row]) -> None:
    """A line for every number of ranks and way, and the bars."""
    if not rows:
        return
    size = f"{rows[0]['num_classes']:,} x {rows[0]['embedding_dim']}"
    print(f"\nbank of {size} with Adam: {rows[0]['bytes'] / 1e6:,.0f} MB\n")
    print(f"{'ranks':>5}  {'':<8}{'seconds':>10}{'MB/s':>10}{'of disk':>10}")
    for row in rows:
        for way in ("write", "save", "read", "load", "verify"):
            cells = number(row[f"{way}_s"], 10, 3) + number(row[f"{way}_mb_s"], 10, 0)
            print(f"{row['ranks']:>5}  {way:<8}{cells}{number(row.get(f'{way}_of_disk'), 10, 2)}")


# ---- training --------------------------------------------------------------------------------------------------------


def measure_training(context: ParallelContext, case: Case) -> list[Row]:
    """Shares of the time, by way."""
    config = load_config(case.config, [f"runs_dir={json.dumps(str(case.folder))}"])
    data = open_training_data(config)
    state = build_train_state(config, context, steps_per_epoch=data.count_steps())
    state.engine.module.train()
    cache = ImageCache() if config.data.cache_images else None
    batches = endless(context, state, lambda epoch: data.loader(context, epoch=epoch, start=0, cache=cache))
    for _ in range(min(case.every, 2 * state.steps_per_epoch)):
        train_step(state, next(batches), measure=False)
    stretches: dict[str, list[Row]] = {way: [] for way in WAYS}
    for _ in range(case.repeats):
        for way in WAYS:
            stretches[way].append(stretch(context, case, state, batches, way))
    sizes = [path.stat().st_size for path in (case.folder / "synchronous").rglob("*") if path.is_file()]
    rows = []
    for way in WAYS:
        row: Row = {"part": "training", "way": way, "ranks": 2, "steps": case.steps, "every": case.every}
        row |= {"rounds": case.repeats, "checkpoint_bytes": sum(sizes) // 2}  # two are kept
        for key in stretches[way][0]:
            row[key] = statistics.median(some[key] for some in stretches[way])
        rows.append(row)
    return rows


def endless(context: ParallelContext, state: TrainState, loader: Callable[[int], Any]) -> Iterator[list[Batch]]:
    """Epoch after epoch; the schedule stays where learning rates are largest."""
    epoch = 0
    while True:
        for batch in loader(epoch):
            state.schedule_step = min(state.schedule_step, 100)
            yield [batch]
        epoch += 1


def stretch(context: ParallelContext, case: Case, state: TrainState, batches: Iterator[list[Batch]], way: str) -> Row:
    """So many steps with checkpoints or without, until the last checkpoint is published."""
    writer = CheckpointWriter(case.folder / way, context, Retention(2), asynchronous=way == "asynchronous")
    saving: dict[str, Any] = {"engine": state.engine, "loss": state.loss, "bank_optimizer": state.bank_optimizer}
    blocked, is_pending = 0.0, False
    quiet: list[float] = []
    beside: list[float] = []
    dist.barrier(context.group)
    begin = time.perf_counter()
    for step in range(1, case.steps + 1):
        is_pending = is_pending and not writer.poll()
        start = time.perf_counter()
        train_step(state, next(batches), measure=False)
        (beside if is_pending else quiet).append(time.perf_counter() - start)
        if way != "none" and step % case.every == 0:
            start = time.perf_counter()
            writer.save(state=RunState(step, 0, 0, context.world_size, {}), **saving)
            blocked += time.perf_counter() - start
            is_pending = way == "asynchronous"
    start = time.perf_counter()
    writer.close()
    blocked += time.perf_counter() - start
    seconds = time.perf_counter() - begin
    slower = sum(beside) - len(beside) * statistics.median(quiet)
    return {
        "seconds": seconds,
        "step_ms": 1e3 * statistics.median(quiet),
        "blocked": blocked / seconds,
        "slower": slower / seconds,
        "steps_beside": len(beside),
    }


def print_training(rows: list[Row]) -> None:
    """A line for every way, and the bar."""
    size = rows[-1]["checkpoint_bytes"] / 1e6
    print(f"\ntraining, a checkpoint of {size:.1f} MB every {rows[0]['every']} of {rows[0]['steps']} steps\n")
    print(f"{'':<14}{'seconds':>10}{'step ms':>10}{'blocked':>10}{'slower':>10}{'steps beside':>14}")
    for row in rows:
        cells = number(row["seconds"], 10, 2) + number(row["step_ms"], 10, 1)
        print(f"{row['way']:<14}{cells}{row['blocked']:>10.2%}{row['slower']:>10.2%}{row['steps_beside']:>14.0f}")


def bars(rows: list[Row]) -> Iterator[str]:
    """One line for each bar."""
    for row in rows:
        if row["part"] == "bank":
            for way in ("save", "load"):
                text = f"{way} on {row['ranks']} rank(s): {row[f'{way}_of_disk']:.2f} of the disk, bar >= {DISK_BAR}"
                yield f"{verdict(row[f'{way}_of_disk'] >= DISK_BAR)} {text}"
        elif row["way"] == "asynchronous":
            cost = row["blocked"] + row["slower"]
            text = f"asynchronous checkpoints: {cost:.2%} of the time, bar <= {TRAINING_BAR:.0%}"
            yield f"{verdict(cost <= TRAINING_BAR)} {text}"


def verdict(met: bool) -> str:
    """The first word of a bar's line."""
    return "met   " if met else "missed"


if __name__ == "__main__":
    main()
