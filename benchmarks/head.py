"""Time and memory of the ProxyGML head on one process: `python benchmarks/head.py [--sizes cub sop] [--repeats 7]`.

Rows: this head; the published formulation written densely (similarities, a 0/1 matrix [P, C] that sums proxies into
classes, a masked softmax over all classes); and the bare product X @ P.T that no exact head can do without. All are
measured in the same call, each in a process of its own so that its peak memory is its own, on the same random batch,
forward and backward; the median of the repeats after one warm-up is shown. The dense head is also checked to give this
head's loss, so that both compute the same thing.

Prints a table and one JSON line per row, with device and versions, for docs/benchmarks/.
"""

import argparse
import json
import multiprocessing
import platform
import resource
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from dist_proxygml import ProxyGMLLoss


class Size(NamedTuple):
    """A problem, and its published settings."""

    batch: int
    num_classes: int
    proxies_per_class: int
    embedding_dim: int
    ratio: float
    regularization_weight: float


SIZES = {
    "cub": Size(32, 100, 12, 512, 0.05, 0.3),
    "sop": Size(32, 11_318, 1, 512, 0.05, 0.0),
}
HEADS = ("product", "dense", "proxygml")


def main() -> None:
    """Measure every head at every size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sizes", nargs="+", choices=sorted(SIZES), default=sorted(SIZES), help="problems (default: all)"
    )
    parser.add_argument("--repeats", type=int, default=7, help="counted repeats of each head")
    parser.add_argument("--threads", type=int, default=2, help="threads of each process")
    arguments = parser.parse_args()
    print(
        f"{'size':<6}{'head':<10}{'forward ms':>12}{'backward ms':>13}{'both ms':>10}{'/ product':>11}"
        f"{'peak MiB':>10}{'loss':>12}"
    )
    for size in arguments.sizes:
        rows = {head: in_own_process(head, size, arguments.repeats, arguments.threads) for head in HEADS}
        if abs(rows["dense"]["loss"] - rows["proxygml"]["loss"]) > 1e-4 * abs(rows["dense"]["loss"]):
            raise SystemExit(f"{size}: the heads disagree: {rows['dense']['loss']} and {rows['proxygml']['loss']}")
        for head, row in rows.items():
            both = row["forward_ms"] + row["backward_ms"]
            ratio = both / (rows["product"]["forward_ms"] + rows["product"]["backward_ms"])
            print(
                f"{size:<6}{head:<10}{row['forward_ms']:>12.2f}{row['backward_ms']:>13.2f}{both:>10.2f}{ratio:>11.1f}"
                f"{row['peak_mib']:>10.0f}{row['loss']:>12.5f}"
            )
        for head, row in rows.items():
            print(
                json.dumps(
                    {
                        "size": size,
                        "head": head,
                        **row,
                        "machine": platform.processor() or platform.machine(),
                        "torch": torch.__version__,
                    }
                )
            )


def in_own_process(head: str, size: str, repeats: int, threads: int) -> dict[str, float]:
    """Measure one head in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, (head, size, repeats, threads))


def measure(head: str, size_name: str, repeats: int, threads: int) -> dict[str, float]:
    """Median times of forward and backward, and peak memory above that of the process before."""
    torch.set_num_threads(threads)
    size = SIZES[size_name]
    torch.manual_seed(0)
    embeddings = F.normalize(torch.randn(size.batch, size.embedding_dim), dim=1).requires_grad_()
    labels = torch.randint(0, size.num_classes, (size.batch,))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    function, proxies = build(head, size)
    times: list[tuple[float, float]] = []
    for _ in range(repeats + 1):
        embeddings.grad = proxies.grad = None
        start = time.perf_counter()
        loss = function(embeddings, labels)
        middle = time.perf_counter()
        loss.backward()
        times.append((middle - start, time.perf_counter() - middle))
    forward, backward = zip(*times[1:], strict=True)
    return {
        "forward_ms": 1e3 * statistics.median(forward),
        "backward_ms": 1e3 * statistics.median(backward),
        "peak_mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
        "loss": loss.item(),
    }


def build(head: str, size: Size) -> tuple[Callable[[torch.Tensor, torch.Tensor], torch.Tensor], torch.nn.Parameter]:
    """A function from embeddings and labels to the loss, and its proxies."""
    loss = ProxyGMLLoss(
        size.num_classes,
        size.embedding_dim,
        proxies_per_class=size.proxies_per_class,
        ratio=size.ratio,
        regularization_weight=size.regularization_weight,
    )
    if head == "proxygml":
        return lambda x, y: loss(x, y).total, loss.proxies
    if head == "product":
        return lambda x, y: (x @ loss.proxies.flatten(0, 1).T).sum(), loss.proxies
    classes = torch.arange(size.num_classes).repeat_interleave(size.proxies_per_class)
    one_hot_PC = F.one_hot(classes, size.num_classes).float()

    def dense(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        proxies_PD = F.normalize(loss.proxies.flatten(0, 1), dim=1)
        similarity_BP = x @ proxies_PD.T
        priority_BP = similarity_BP.detach() + 2.0 * (
            y[:, None] == classes
        )  # cosines are at most 1: positives come first
        kept_BP = torch.zeros_like(similarity_BP).scatter_(1, priority_BP.topk(loss.topk, dim=1).indices, 1.0)
        logits_BC, kept_BC = (similarity_BP * kept_BP) @ one_hot_PC, kept_BP @ one_hot_PC > 0
        total = F.cross_entropy(logits_BC.masked_fill(~kept_BC, -torch.inf), y)
        if size.regularization_weight:
            total = total + size.regularization_weight * F.cross_entropy(
                proxies_PD @ proxies_PD.T @ one_hot_PC, classes
            )
        return total

    return dense, loss.proxies


if __name__ == "__main__":
    main()
