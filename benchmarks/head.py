"""Time and memory of this project's heads and of others in one process.

    python -m benchmarks.head                                        sop cars 100k 1m 10m
    python -m benchmarks.head --sizes sop --heads published proxygml --json sop.jsonl
    python -m benchmarks.head --device cuda --sizes h100_1m

Each row (a head with an optimizer) runs in a process of its own, so that its peak memory is its own: three steps of
warm-up, then the repeats, each on another batch of random unit embeddings and random labels (a short step is repeated
for two seconds). A step is forward, backward (the embeddings' gradient included), optimizer and zero_grad; medians are
shown.

A shared machine's speed varies from minute to minute, so every repeat measures the bare product X @ P.T beside the
step. The ratio to it is the median over repeats; ratios between rows go through it: (row / product) / (row / product).

    peak    memory of the process above its start; extra: beyond bank, optimizer state and a dense gradient
    faster  the reference's step time over the row's: the published formulation, NormalizedSoftmaxLoss where that
            cannot run

A baseline that needs more memory than the machine has is not run. The published formulation must give this head's
loss to 1e-4 of it, or the program fails. Prints a table, then the bars that the project has set itself, then one JSON
line per row. Several ranks: benchmarks/ranks.py.
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.baselines import (
    METRIC_LEARNING_LOSSES,
    BareProduct,
    ClassSoftmax,
    PublishedProxyGML,
    bytes_needed,
    metric_learning_loss,
)
from dist_proxygml import Head as Choices
from dist_proxygml import ProxyGMLLoss, ProxyLoss
from dist_proxygml.distributed.memory import peak_memory
from dist_proxygml.head.bank import FusedSearches
from dist_proxygml.head.optim import RowwiseAdagrad

MIB = 1 << 20
WARM_UP = 3
BASELINES = ("published", *METRIC_LEARNING_LOSSES, "full_softmax", "sampled_softmax")
ROW_SPARSE = ("rowwise_adagrad", "sparse_adam")

Row = dict[str, Any]


class Size(NamedTuple):
    """A problem."""

    batch_size: int
    num_classes: int
    proxies_per_class: int
    embedding_dim: int
    ratio: float | None = None
    topk: int | None = None
    regularization_weight: float = 0.0
    matmul_dtype: str = "float32"
    dense: bool = True
    """False: too large for dense gradients, so only row-sparse optimizers, and no baselines."""
    memory_budget: int | None = None
    """Of this project's ProxyGML, in bytes; None: its default."""

    @property
    def num_proxies(self) -> int:
        """P = C * N."""
        return self.num_classes * self.proxies_per_class


SIZES = {
    "tiny": Size(8, 60, 2, 16, ratio=0.1),
    "sop": Size(32, 11_318, 1, 512, ratio=0.05),
    "cars": Size(32, 98, 12, 512, ratio=0.05, regularization_weight=0.3),
    "1k": Size(64, 1_000, 1, 128, topk=50),
    "10k": Size(64, 10_000, 1, 128, topk=500),
    "100k": Size(128, 100_000, 1, 512, topk=1000),
    "1m": Size(64, 1_000_000, 1, 128, topk=500),
    "10m": Size(64, 10_000_000, 1, 64, topk=500, dense=False),
    "h100_1m": Size(1024, 1_000_000, 1, 512, topk=1000, matmul_dtype="bfloat16"),
    "h100_10m": Size(1024, 10_000_000, 1, 256, topk=1000, matmul_dtype="bfloat16"),
}
DEFAULT_SIZES = ("sop", "cars", "100k", "1m", "10m")
PRODUCTS = ("product", "onednn_product")
PROXYGML = ("proxygml", "proxygml_fused")
PUBLISHED_RATIO = "proxygml_5_percent"  # k in proportion to the proxies, where sizes have a number
OURS = (*PROXYGML, PUBLISHED_RATIO, "all", "sampled")
HEADS = (*PRODUCTS, *BASELINES, *OURS)
# Heads that only one kind of device has.
ONLY_ON = {"onednn_product": "cpu", "proxygml_fused": "cuda"}


class Settings(NamedTuple):
    """How every row is measured."""

    repeats: int
    threads: int
    device: str


class Head(NamedTuple):
    """What a step needs."""

    loss: Callable[[Tensor, Tensor], Tensor]
    parameters: list[nn.Parameter]
    searches: FusedSearches | None = None


def main() -> None:
    """Measure the rows of every size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sizes", nargs="+", choices=SIZES, default=DEFAULT_SIZES, metavar="SIZE", help=", ".join(SIZES)
    )
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=HEADS, metavar="HEAD", help=", ".join(HEADS))
    parser.add_argument("--repeats", type=int, default=7, help="counted steps of a row, at least")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of each process")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--matmul-dtype", choices=("float32", "bfloat16"), help="of the similarity product (default: the size's own)"
    )
    parser.add_argument("--json", type=Path, help="file for the JSON lines as well; written anew")
    arguments = parser.parse_args()
    settings = Settings(arguments.repeats, arguments.threads, arguments.device)
    load = os.getloadavg()[0]
    if load > 0.5:  # threads that wait for each other at every chunk suffer most
        print(f"others keep {load:.1f} of {os.cpu_count()} cores busy: expect wrong times, also with fewer threads")
    rows: list[Row] = []
    for name in arguments.sizes:
        size = SIZES[name]
        if arguments.matmul_dtype is not None:
            size = size._replace(matmul_dtype=arguments.matmul_dtype)
        print_heading(name, size)
        reference: Row | None = None
        heads = tuple(head for head in arguments.heads if ONLY_ON.get(head, settings.device) == settings.device)
        for head, optimizer in rows_of(size, heads):
            row = {"size": name, "head": head, "optimizer": optimizer, **measured(head, optimizer, size, settings)}
            if head in ("published", "normalized_softmax") and reference is None and "skipped" not in row:
                reference = row
            if reference is not None and "skipped" not in row and optimizer is not None:
                row["reference"] = reference["head"]
                row["faster"] = reference["step_over_product"] / row["step_over_product"]
            rows.append(row)
            print_row(row)
    print()
    check_losses(rows)
    for line in bars(rows):
        print(line)
    print()
    lines = [json.dumps(rounded({**row, **machine(settings)})) for row in rows]
    print("\n".join(lines))
    if arguments.json is not None:
        arguments.json.write_text("\n".join(lines) + "\n")


def rows_of(size: Size, heads: tuple[str, ...]) -> Iterator[tuple[str, str | None]]:
    """Heads and optimizers of a size; the references come before this head."""
    for head in HEADS:
        if head not in heads or (head in BASELINES and not size.dense):
            continue
        if head in PRODUCTS:
            yield head, None
        elif head not in OURS:
            yield head, "adam"
        else:
            if size.dense:
                yield from ((head, optimizer) for optimizer in ("adam", "sgd"))
            if size.regularization_weight == 0 and head != "all":  # else every proxy has a gradient
                yield from ((head, optimizer) for optimizer in ROW_SPARSE)


# ---- one row, in a process of its own --------------------------------------------------------------------------------


def measured(head: str, optimizer: str | None, size: Size, settings: Settings) -> Row:
    """The numbers of one row, or why there are none."""
    if head in BASELINES:
        needed = bytes_needed(
            head,
            batch_size=size.batch_size,
            num_classes=size.num_classes,
            proxies_per_class=size.proxies_per_class,
            embedding_dim=size.embedding_dim,
            regularization_weight=size.regularization_weight,
        )
        there = memory_of(settings.device)
        if needed > there:
            return {"skipped": f"needs {needed:,} bytes of memory, the machine has {there:,}"}
    try:
        with ProcessPoolExecutor(1, mp_context=fork_server()) as pool:
            return pool.submit(measure, head, optimizer, size, settings).result()
    except BrokenProcessPool:
        return {"skipped": "its process was killed, most likely for want of memory"}
    except ImportError as error:
        return {"skipped": f"not installed: {error.name}"}


def fork_server() -> ForkServerContext:
    """A process that has imported what takes long, so that a row's process starts at once and its imports cost it no
    memory of its own.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["torch._dynamo", "pytorch_metric_learning.losses", "benchmarks.baselines", "dist_proxygml.head.optim"]
    )
    return context


def measure(head_name: str, optimizer_name: str | None, size: Size, settings: Settings) -> Row:
    """Times in ms, memory in MiB and the first loss of one row; runs in the row's process."""
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    if optimizer_name is None:
        return {**measure_product(head_name, size, settings), **size._asdict()}
    return {**measure_head(head_name, optimizer_name, size, settings), **size._asdict()}


def measure_head(head_name: str, optimizer_name: str, size: Size, settings: Settings) -> Row:
    """Training steps of a head, each beside the bare product."""
    # 1. code, thread pools and the like take their memory in a step at a tiny size
    device = settings.device
    tiny_head = build_head(head_name, SIZES["tiny"], device, sparse=optimizer_name in ROW_SPARSE)
    tiny_optimizer = build_optimizer(optimizer_name, tiny_head.parameters)
    run_step(tiny_head, tiny_optimizer, *next(random_batches(SIZES["tiny"], device)), device=device)
    # 2. memory, and warm-up
    batches = random_batches(size, device)
    start_bytes = peak_bytes(device)
    head = build_head(head_name, size, device, sparse=optimizer_name in ROW_SPARSE)
    optimizer = build_optimizer(optimizer_name, head.parameters)
    losses = [run_step(head, optimizer, *next(batches), device=device)[1] for _ in range(WARM_UP)]
    memory = memory_columns(
        peak_bytes(device) - start_bytes,
        bank=sum(bytes_of(parameter) for parameter in head.parameters),
        state=state_bytes(optimizer),
        dense_gradient=optimizer_name not in ROW_SPARSE,
    )
    # 3. time
    product = BareProduct(
        rows_of_bank(head, size), batch_size=size.batch_size, matmul_dtype=getattr(torch, size.matmul_dtype)
    )
    time_product(product, next(batches)[0], device)
    times = []
    for _ in repeated(settings.repeats):
        embeddings, labels = next(batches)
        product_ms = time_product(product, embeddings, device)
        times.append((*run_step(head, optimizer, embeddings, labels, device=device)[0], product_ms))
    forward, backward, update, step, product_times = zip(*times, strict=True)
    return {
        "forward_ms": statistics.median(forward),
        "backward_ms": statistics.median(backward),
        "optimizer_ms": statistics.median(update),
        "step_ms": statistics.median(step),
        "fastest_step_ms": min(step),
        "slowest_step_ms": max(step),
        "product_ms": statistics.median(product_times),
        "forward_backward_over_product": statistics.median((t[0] + t[1]) / t[4] for t in times),
        "step_over_product": statistics.median(t[3] / t[4] for t in times),
        **memory,
        "loss": losses[0],
        "searches_done": None if head.searches is None else head.searches.done,
        "searches_given_up": None if head.searches is None else head.searches.given_up,
        "steps": len(times),
    }


def measure_product(head_name: str, size: Size, settings: Settings) -> Row:
    """The bare product, over a bank of the same size; by torch.mm beside it where it is another one."""
    device, matmul_dtype = settings.device, getattr(torch, size.matmul_dtype)
    tiny_bank = torch.ones(64, size.embedding_dim, device=device)
    batches = random_batches(size, device)
    BareProduct(tiny_bank, batch_size=size.batch_size, matmul_dtype=matmul_dtype)(next(batches)[0])
    start_bytes = peak_bytes(device)
    bank_PD = torch.empty(size.num_proxies, size.embedding_dim, device=device).uniform_(-1, 1)
    bare, product = (
        BareProduct(bank_PD, batch_size=size.batch_size, matmul_dtype=matmul_dtype, onednn=onednn)
        for onednn in (False, head_name == "onednn_product")
    )
    pairs = []
    for _ in repeated(settings.repeats + 1):
        embeddings, _ = next(batches)
        pairs.append((time_product(product, embeddings, device), time_product(bare, embeddings, device)))
    times, _ = zip(*pairs[1:], strict=True)
    peak = peak_bytes(device) - start_bytes
    return {
        "forward_ms": statistics.median(times),
        "step_ms": statistics.median(times),
        "fastest_step_ms": min(times),
        "slowest_step_ms": max(times),
        "step_over_product": statistics.median(own / beside for own, beside in pairs[1:]),
        **memory_columns(peak, bank=bytes_of(bank_PD), state=0, dense_gradient=False),
        "steps": len(times),
    }


def repeated(repeats: int) -> Iterator[None]:
    """So many times, and more of what is short: up to a hundred times in two seconds."""
    start = time.perf_counter()
    for count in range(max(100, repeats)):
        if count >= repeats and time.perf_counter() - start > 2:
            return
        yield


def build_head(name: str, size: Size, device: str, *, sparse: bool) -> Head:
    """A head with its initial proxies."""
    matmul_dtype = getattr(torch, size.matmul_dtype)
    if name in ("all", "sampled"):
        choices = Choices("all", scale=20.0) if name == "all" else Choices("sampled", share=0.1, scale=20.0)
        loss = ProxyLoss(
            size.num_classes,
            size.embedding_dim,
            choices,
            proxies_per_class=size.proxies_per_class,
            regularization_weight=size.regularization_weight,
            normalize=False,
            matmul_dtype=matmul_dtype,
            sparse=sparse,
        ).to(device)
        return Head(lambda embeddings, labels: loss(embeddings, labels).total, [loss.proxies])
    if name in (*PROXYGML, PUBLISHED_RATIO, "published"):
        ratio, topk = (0.05, None) if name == PUBLISHED_RATIO else (size.ratio, size.topk)
        proxygml = ProxyGMLLoss(
            size.num_classes,
            size.embedding_dim,
            normalize=False,
            proxies_per_class=size.proxies_per_class,
            ratio=ratio,
            topk=topk,
            regularization_weight=size.regularization_weight,
            matmul_dtype=matmul_dtype,
            memory_budget=size.memory_budget,
            fused=name == "proxygml_fused",
            sparse=sparse,
        ).to(device)
        if name != "published":
            searches = proxygml.searches if proxygml.fused else None
            return Head(lambda embeddings, labels: proxygml(embeddings, labels).total, [proxygml.proxies], searches)
        module: nn.Module = PublishedProxyGML(
            proxygml.proxies.detach().flatten(0, 1),
            num_classes=size.num_classes,
            topk=proxygml.topk,
            regularization_weight=size.regularization_weight,
        )
    elif name in METRIC_LEARNING_LOSSES:
        module = metric_learning_loss(
            name,
            num_classes=size.num_classes,
            proxies_per_class=size.proxies_per_class,
            embedding_dim=size.embedding_dim,
        )
    else:
        rate = 0.1 if name == "sampled_softmax" else 1.0
        module = ClassSoftmax(size.num_classes, size.embedding_dim, sampling_rate=rate, matmul_dtype=matmul_dtype)
    module.to(device)
    return Head(module, list(module.parameters()))


def build_optimizer(name: str, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizers of the proxies; the learning rate does not matter here, eps is the published one."""
    if name == "adam":
        return torch.optim.Adam(parameters, lr=1e-3, eps=0.01, fused=True)  # as the project uses it; for every head
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=1e-3)
    if name == "rowwise_adagrad":
        return RowwiseAdagrad(parameters, lr=1e-3, eps=0.01)
    return torch.optim.SparseAdam(parameters, lr=1e-3, eps=0.01)


def rows_of_bank(head: Head, size: Size) -> Tensor:
    """The head's own bank as [P, D] for the product beside it; another of that size where its layout is another."""
    (parameter,) = head.parameters
    if parameter.shape[-1] == size.embedding_dim and parameter.numel() == size.num_proxies * size.embedding_dim:
        return parameter.detach().view(size.num_proxies, size.embedding_dim)
    return torch.empty(size.num_proxies, size.embedding_dim, device=parameter.device).uniform_(-1, 1)


def run_step(
    head: Head, optimizer: torch.optim.Optimizer, embeddings: Tensor, labels: Tensor, *, device: str
) -> tuple[tuple[float, float, float, float], float]:
    """One training step: (forward, backward, optimizer, all of it with zero_grad) in ms, and the loss."""
    embeddings = embeddings.clone().requires_grad_()
    clock = [now(device)]
    loss = head.loss(embeddings, labels)
    clock.append(now(device))
    loss.backward()
    clock.append(now(device))
    optimizer.step()
    clock.append(now(device))
    optimizer.zero_grad()
    clock.append(now(device))
    assert embeddings.grad is not None, "the embeddings' gradient is a part of backward"
    forward, backward, update = (1e3 * (clock[i + 1] - clock[i]) for i in range(3))
    return (forward, backward, update, 1e3 * (clock[4] - clock[0])), loss.item()


# ---- data, clock, memory ---------------------------------------------------------------------------------------------


def random_batches(size: Size, device: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Unit embeddings in random directions and uniform labels, other ones each time and the same for every head. Kept
    proxies rarely coincide: the most work there can be.
    """
    generator = torch.Generator().manual_seed(0)
    while True:
        embeddings_BD = torch.randn(size.batch_size, size.embedding_dim, generator=generator)
        labels_B = torch.randint(0, size.num_classes, (size.batch_size,), generator=generator)
        yield F.normalize(embeddings_BD, dim=1).to(device), labels_B.to(device)


def now(device: str) -> float:
    """Seconds, after what was started on the device has ended."""
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def time_product(product: BareProduct, embeddings: Tensor, device: str) -> float:
    """Milliseconds of one product; a short one is done again until 1 ms has passed, for the clock's sake."""
    calls, start = 0, now(device)
    while calls == 0 or now(device) - start < 1e-3:
        product(embeddings)
        calls += 1
    return 1e3 * (now(device) - start) / calls


def peak_bytes(device: str) -> int:
    """Most memory that this process has held so far: resident on CPUs, allocated on the device."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    return peak_memory()


def memory_of(device: str) -> int:
    """Bytes of memory of the machine or the device."""
    if device != "cpu":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def bytes_of(tensor: Tensor) -> int:
    """Bytes of its elements."""
    return tensor.numel() * tensor.element_size()


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of an optimizer's state."""
    states = (value for state in optimizer.state.values() for value in state.values())
    return sum(bytes_of(value) for value in states if isinstance(value, Tensor))


def memory_columns(peak: int, *, bank: int, state: int, dense_gradient: bool) -> Row:
    """Memory in MiB."""
    gradient = bank if dense_gradient else 0
    return {
        "peak_mib": peak / MIB,
        "bank_mib": bank / MIB,
        "state_mib": state / MIB,
        "gradient_mib": gradient / MIB,
        "extra_mib": (peak - bank - state - gradient) / MIB,
    }


def machine(settings: Settings) -> Row:
    """What the numbers hold for."""
    models = [line for line in cpu_lines() if line.startswith("model name")]
    return {
        "device": torch.cuda.get_device_name() if settings.device != "cpu" else "cpu",
        "cpu": models[0].partition(":")[2].strip() if models else platform.machine(),
        "threads": settings.threads,
        "torch": torch.__version__,
    }


def cpu_lines() -> list[str]:
    """What Linux says about the processor; nothing elsewhere."""
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


# ---- what is printed -------------------------------------------------------------------------------------------------


def print_heading(name: str, size: Size) -> None:
    """The size and the names of the columns."""
    k = f"r {size.ratio}" if size.topk is None else f"k {size.topk:,}"
    print(
        f"\n{name}: batch {size.batch_size}, {size.num_classes:,} classes, {size.proxies_per_class} proxies per class, "
        f"D {size.embedding_dim}, {k}, lambda {size.regularization_weight}, product in {size.matmul_dtype}\n"
        f"{'head':<19}{'optimizer':<16}{'forward':>10}{'backward':>10}{'optimizer':>10}{'step ms':>10}{'/product':>10}"
        f"{'faster':>8}{'peak MiB':>10}{'extra':>8}{'loss':>10}"
    )


def print_row(row: Row) -> None:
    """A line of the table."""
    start = f"{row['head']:<19}{row['optimizer'] or '':<16}"
    if "skipped" in row:
        print(f"{start}  not run: {row['skipped']}", flush=True)
        return
    times = "".join(number(row.get(key), 10, 2) for key in ("forward_ms", "backward_ms", "optimizer_ms", "step_ms"))
    print(
        f"{start}{times}{number(row['step_over_product'], 10, 2)}{number(row.get('faster'), 8, 2)}"
        f"{number(row['peak_mib'], 10, 0)}{number(row['extra_mib'], 8, 0)}{number(row.get('loss'), 10, 4)}",
        flush=True,
    )
    if row.get("searches_given_up"):
        print(f"{start}  the kernels' search was given up {row['searches_given_up']} times: a larger memory budget")


def number(value: float | None, width: int, digits: int) -> str:
    """A cell."""
    return f"{'-':>{width}}" if value is None else f"{value:>{width},.{digits}f}"


def rounded(row: Row) -> Row:
    """Six significant digits."""
    return {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in row.items()}


def check_losses(rows: list[Row]) -> None:
    """The published formulation and this head compute the same thing."""
    for name in {row["size"] for row in rows}:
        losses = {
            f"{row['head']} {row['optimizer']}": row["loss"]
            for row in rows
            if row["size"] == name and row["head"] in ("published", *PROXYGML) and "loss" in row
        }
        if losses and max(losses.values()) - min(losses.values()) > 1e-4 * abs(max(losses.values())):
            raise SystemExit(f"{name}: expected the same loss of every formulation, got {losses}")


def bars(rows: list[Row]) -> Iterator[str]:
    """One line for each bar whose rows were measured."""
    found = {(row["size"], row["head"], row["optimizer"]): row for row in rows if "skipped" not in row}

    def line(text: str, measured: float, limit: float, *, at_least: bool) -> str:
        met = measured >= limit if at_least else measured <= limit
        return f"{'met   ' if met else 'missed'} {text}: {measured:.2f}, bar {'>=' if at_least else '<='} {limit:g}"

    for name, limit in (("sop", 20), ("cars", 6)):
        ours, published = found.get((name, "proxygml", "adam")), found.get((name, "published", "adam"))
        if ours is not None and published is not None:
            ratio = published["forward_backward_over_product"] / ours["forward_backward_over_product"]
            yield line(f"{name}: forward + backward, times faster than published", ratio, limit, at_least=True)
            if name == "sop":
                share = published["extra_mib"] / ours["extra_mib"]
                yield line("sop: extra memory, times smaller than published", share, 8, at_least=True)
    softmax = found.get(("100k", "normalized_softmax", "adam"))
    for optimizer in ROW_SPARSE:
        row = found.get(("100k", "proxygml", optimizer))
        if row is not None and softmax is not None:
            text = f"100k: step with {optimizer}, times faster than NormalizedSoftmaxLoss with Adam"
            yield line(text, softmax["step_over_product"] / row["step_over_product"], 4, at_least=True)
    for optimizer in ROW_SPARSE:
        row, larger = found.get(("1m", "proxygml", optimizer)), found.get(("10m", "proxygml", optimizer))
        if row is not None:
            text = f"1m: step with {optimizer} over the bare product"
            yield line(text, row["step_over_product"], 2, at_least=False)
            yield line(f"1m: extra memory with {optimizer}, MiB", row["extra_mib"], 400, at_least=False)
        if row is not None and larger is not None:
            work = larger["num_classes"] * larger["embedding_dim"] / (row["num_classes"] * row["embedding_dim"])
            text = f"10m: step with {optimizer} over that of 1m, per P*D"
            yield line(text, larger["step_ms"] / row["step_ms"] / work, 1.5, at_least=False)
    everything = found.get(("1m", "all", "adam"))
    if everything is not None:
        text = "1m: forward + backward of all proxies over the bare product"
        yield line(text, everything["forward_backward_over_product"], 3.3, at_least=False)
        yield line("1m: extra memory of all proxies, MiB", everything["extra_mib"], 100, at_least=False)


if __name__ == "__main__":
    main()
