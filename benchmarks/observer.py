"""What counting the use of proxies (head/statistics.py) adds to a step of the head.

    python -m benchmarks.observer 100k 1m

Three steps of warm-up, then steps as benchmarks/head.py has them (forward, backward, row-wise optimizer), on random
unit embeddings. Taken apart: what a step takes, and what the observer takes of it, as a step that is logged and as one
that is not; the medians. So the speed of a shared machine, which changes by more than what is measured, does not
matter. The last column is the share where every tenth step is logged.
"""

import argparse
import statistics
import time

import torch
import torch.nn.functional as F

from benchmarks.head import SIZES
from dist_proxygml import ProxyGMLLoss
from dist_proxygml.head.classification import KeptPairs
from dist_proxygml.head.optim import RowwiseAdagrad
from dist_proxygml.head.statistics import ProxyStatistics

WARM_UP = 3


def measure(name: str, *, repeats: int, device: torch.device) -> str:
    """A line of the table."""
    size = SIZES[name]
    loss = ProxyGMLLoss(
        size.num_classes,
        size.embedding_dim,
        normalize=False,
        proxies_per_class=size.proxies_per_class,
        ratio=size.ratio,
        topk=size.topk,
        sparse=True,
        initialization="unit",
    ).to(device)
    optimizer = RowwiseAdagrad(loss.parameters(), lr=0.01)
    counted = ProxyStatistics(loss.partition, size.proxies_per_class, device=device, group=None)
    times: dict[bool, list[float]] = {False: [], True: []}
    is_logged = False

    def observe(kept: KeptPairs) -> None:
        start = _now(device)
        counted.observe(kept)
        times[is_logged].append(_now(device) - start)

    loss.observer = observe
    steps = []
    for repeat in range(WARM_UP + 2 * repeats):
        is_logged = repeat % 2 == 1
        counted.begin_step(is_logged=is_logged)
        embeddings = F.normalize(torch.randn(size.batch_size, size.embedding_dim, device=device)).requires_grad_()
        labels = torch.randint(size.num_classes, (size.batch_size,), device=device)
        start = _now(device)
        loss(embeddings, labels).total.backward()
        optimizer.step()
        optimizer.zero_grad()
        steps.append(_now(device) - start)
    step = statistics.median(steps[WARM_UP:])
    plain, logged = (statistics.median(times[kind][WARM_UP:]) for kind in (False, True))
    share = (0.9 * plain + 0.1 * logged) / step
    return f"{name:>8} {1e3 * step:10.1f} {1e3 * plain:10.3f} {1e3 * logged:10.3f} {100 * share:9.2f} %"


def main() -> None:
    """Measure the sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", default=["100k", "1m"], metavar="SIZE", help=", ".join(SIZES))
    parser.add_argument("--repeats", type=int, default=20, help="logged steps, and as many that are not (default 20)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{'':>8} {'step, ms':>10} {'observer':>10} {'if logged':>10} {'share':>11}")
    for name in arguments.sizes:
        print(measure(name, repeats=arguments.repeats, device=torch.device(arguments.device)), flush=True)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


if __name__ == "__main__":
    main()
