"""What a rank holds and receives when the proxies are divided over several ranks of this machine (gloo, one thread
each).

    python -m benchmarks.ranks                                  1, 2 and 4 ranks, 100,000 and 1,000,000 classes
    python -m benchmarks.ranks --num-classes 1000 --embedding-dim 16 --topk 50 --json ranks.jsonl

For each head and number of classes: bytes of proxies and optimizer state on the rank that has most, which fall as one
over the number of ranks, and bytes that rank 0's collectives bring it per step, beside the formula of
`dist_proxygml.head.traffic`: with the embeddings gathered they do not depend on the number of classes. The loss must be
the same on any number of ranks, or the program fails. Times are medians of whole steps; with more ranks than cores they
say how much work there is, not how fast it would go.

The class softmax (benchmarks/baselines.py) stands beside it: it receives less, and its logits and dense gradient are
what its memory goes to.
"""

import argparse
import json
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from benchmarks.baselines import ClassSoftmax
from benchmarks.head import (
    MIB,
    WARM_UP,
    Head,
    Row,
    Settings,
    Size,
    build_optimizer,
    bytes_of,
    fork_server,
    machine,
    number,
    peak_bytes,
    random_batches,
    rounded,
    run_step,
    state_bytes,
)
from dist_proxygml import ProxyGMLLoss
from dist_proxygml.distributed.collectives import count_bytes, gather_objects
from dist_proxygml.head.traffic import SELECTIONS, bytes_per_step

HEADS = (*SELECTIONS, "full_softmax", "sampled_softmax")


class Case(NamedTuple):
    """What the ranks of one run do."""

    head: str
    world_size: int
    size: Size
    repeats: int


def main() -> None:
    """Measure every head on every number of ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-classes", type=int, nargs="+", default=[100_000, 1_000_000], help="C over all ranks")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="numbers of ranks")
    parser.add_argument(
        "--heads",
        nargs="+",
        choices=HEADS,
        default=["candidates", "histogram", "full_softmax"],
        help="ways of ProxyGML to select, and other heads; gather holds the whole bank on every rank",
    )
    parser.add_argument("--batch-size", type=int, default=64, help="images over all ranks; divides by each of --ranks")
    parser.add_argument("--embedding-dim", type=int, default=128, help="D")
    parser.add_argument("--topk", type=int, default=500, help="k, proxies kept per image")
    parser.add_argument("--repeats", type=int, default=3, help="counted steps")
    parser.add_argument("--json", type=Path, help="file for the JSON lines as well")
    arguments = parser.parse_args()
    if any(arguments.batch_size % world_size for world_size in arguments.ranks):
        parser.error(f"expected --batch-size to divide by each of --ranks, got {arguments.batch_size}")
    print(
        f"{'head':<17}{'classes':>12}{'ranks':>6}{'bank MiB':>10}{'state MiB':>10}{'extra MiB':>10}{'received':>12}"
        f"{'formula':>12}{'step ms':>10}{'loss':>10}"
    )
    rows = []
    for head in arguments.heads:
        for num_classes in arguments.num_classes:
            size = Size(arguments.batch_size, num_classes, 1, arguments.embedding_dim, topk=arguments.topk)
            for world_size in arguments.ranks:
                rows.append(measured(Case(head, world_size, size, arguments.repeats)))
                print_row(rows[-1])
    print()
    check_losses(rows)
    for line in bars(rows):
        print(line)
    print()
    settings = Settings(arguments.repeats, threads=1, device="cpu")
    lines = [json.dumps(rounded({**row, **machine(settings)})) for row in rows]
    print("\n".join(lines))
    if arguments.json is not None:
        arguments.json.write_text("\n".join(lines) + "\n")


def measured(case: Case) -> Row:
    """Start the ranks, wait for them, and read what rank 0 wrote."""
    fork_server()  # what takes long to import is loaded there, once
    with tempfile.TemporaryDirectory(prefix="ranks-") as directory:
        multiprocessing.start_processes(
            run_rank, (case, directory), nprocs=case.world_size, join=True, start_method="forkserver"
        )
        return json.loads((Path(directory) / "row.json").read_text())


def run_rank(rank: int, case: Case, directory: str) -> None:
    """The steps of one rank; rank 0 writes the row."""
    torch.set_num_threads(1)
    if any(name == "lo" for _, name in socket.if_nameindex()):  # the host's own name may not resolve
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    rendezvous = f"file://{directory}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=case.world_size)
    row = measure(case, dist.group.WORLD)
    if rank == 0:
        (Path(directory) / "row.json").write_text(json.dumps(row))
    dist.destroy_process_group()


def measure(case: Case, group: dist.ProcessGroup) -> Row:
    """The row; called on all ranks, the same on each."""
    # 1. code and the like take their memory in a step at a small size
    rank, world_size = dist.get_rank(group), case.world_size
    small = build_head(case.head, case.size._replace(num_classes=8 * world_size, topk=8), group)
    small_batch = next(own_images(case.size._replace(num_classes=8), rank, world_size))
    run_step(small, build_optimizer(optimizer_of(case.head), small.parameters), *small_batch, device="cpu")
    # 2. warm-up, memory, bytes
    batches = own_images(case.size, rank, world_size)
    start_bytes = peak_bytes("cpu")
    head = build_head(case.head, case.size, group)
    optimizer = build_optimizer(optimizer_of(case.head), head.parameters)
    with count_bytes() as traffic:
        loss = run_step(head, optimizer, *next(batches), device="cpu")[1]
    for _ in range(WARM_UP - 1):
        run_step(head, optimizer, *next(batches), device="cpu")
    bank = sum(bytes_of(parameter) for parameter in head.parameters)
    gradient = bank if optimizer_of(case.head) == "sgd" else 0
    own = {
        "bank_mib": bank / MIB,
        "state_mib": state_bytes(optimizer) / MIB,
        "extra_mib": (peak_bytes("cpu") - start_bytes - bank - gradient - state_bytes(optimizer)) / MIB,
    }
    all_ranks = gather_objects(own, group=group)
    # 3. time
    times = []
    for _ in range(case.repeats):
        dist.barrier(group)
        start = time.perf_counter()
        run_step(head, optimizer, *next(batches), device="cpu")
        times.append(1e3 * (time.perf_counter() - start))
    return {
        "head": case.head,
        "optimizer": optimizer_of(case.head),
        "ranks": world_size,
        **{key: max(values[key] for values in all_ranks) for key in own},
        "received_bytes": traffic.received,
        "formula_bytes": formula(case),
        "step_ms": statistics.median(times),
        "loss": loss,
        **case.size._asdict(),
    }


def build_head(name: str, size: Size, group: dist.ProcessGroup) -> Head:
    """A head whose classes are divided over the ranks."""
    if name in SELECTIONS:
        proxygml = ProxyGMLLoss(
            size.num_classes,
            size.embedding_dim,
            normalize=False,
            topk=size.topk,
            group=group,
            selection=name,
            sparse=optimizer_of(name) != "sgd",
        )
        return Head(lambda embeddings, labels: proxygml(embeddings, labels).total, [proxygml.proxies])
    rate = 0.1 if name == "sampled_softmax" else 1.0
    softmax = ClassSoftmax(size.num_classes, size.embedding_dim, sampling_rate=rate, group=group)
    return Head(softmax, [softmax.centers_cD])


def optimizer_of(head: str) -> str:
    """Row-sparse where the gradient can be sparse."""
    return "rowwise_adagrad" if head in ("candidates", "histogram") else "sgd"


def own_images(size: Size, rank: int, world_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """This rank's share of batches that are the same for any number of ranks."""
    for embeddings_BD, labels_B in random_batches(size, "cpu"):
        yield embeddings_BD.chunk(world_size)[rank], labels_B.chunk(world_size)[rank]


def formula(case: Case) -> int | None:
    """Bytes that rank 0 should receive per step; None for a softmax, which has no formula here."""
    if case.head not in SELECTIONS:
        return None
    size = case.size
    return bytes_per_step(
        case.head,
        batch_size=size.batch_size,
        num_classes=size.num_classes,
        proxies_per_class=size.proxies_per_class,
        embedding_dim=size.embedding_dim,
        topk=size.topk,
        world_size=case.world_size,
    )


def print_row(row: Row) -> None:
    """A line of the table."""
    memory = "".join(number(row[key], 10, 2) for key in ("bank_mib", "state_mib", "extra_mib"))
    print(
        f"{row['head']:<17}{row['num_classes']:>12,}{row['ranks']:>6}{memory}{number(row['received_bytes'], 12, 0)}"
        f"{number(row['formula_bytes'], 12, 0)}{number(row['step_ms'], 10, 1)}{number(row['loss'], 10, 5)}",
        flush=True,
    )


def check_losses(rows: list[Row]) -> None:
    """One loss for any number of ranks and any way to select."""
    for num_classes in {row["num_classes"] for row in rows}:
        losses = [row["loss"] for row in rows if row["num_classes"] == num_classes and row["head"] in SELECTIONS]
        if losses and max(losses) - min(losses) > 1e-5 * max(losses):
            raise SystemExit(f"{num_classes} classes: expected one loss on any number of ranks, got {losses}")


def bars(rows: list[Row]) -> Iterator[str]:
    """One line for each bar of ProxyGML."""
    for head in SELECTIONS:
        mine = [row for row in rows if row["head"] == head]
        if not mine:
            continue
        shares = [
            row["ranks"] * row[key] / one[key]
            for one in mine
            for row in mine
            for key in ("bank_mib", "state_mib")
            if one["ranks"] == 1 and row["num_classes"] == one["num_classes"] and one[key] > 0
        ]
        if shares:
            text = (
                f"{head}: ranks times a rank's bank and state, over those of one rank: {max(shares):.4f}, bar <= 1.01"
            )
            yield f"{verdict(max(shares) <= 1.01)} {text}"
        off = max(abs(row["received_bytes"] - row["formula_bytes"]) / max(1, row["formula_bytes"]) for row in mine)
        yield f"{verdict(off <= 0.01)} {head}: bytes received off the formula by at most {100 * off:.2f} %, bar <= 1 %"
        if head != "gather":
            growth = max(
                large["received_bytes"] / max(1, small["received_bytes"])
                for small in mine
                for large in mine
                if small["ranks"] == large["ranks"] and small["num_classes"] <= large["num_classes"]
            )
            text = f"{head}: bytes received with most classes over those with fewest: {growth:.3f}, bar <= 1.01"
            yield f"{verdict(growth <= 1.01)} {text}"


def verdict(met: bool) -> str:
    """The first word of a bar's line."""
    return "met   " if met else "missed"


if __name__ == "__main__":
    main()
