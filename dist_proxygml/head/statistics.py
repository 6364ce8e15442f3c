"""Statistics of proxy use and of kept similarities, collected during training.

    used        the proxy was the nearest of its class's N to an image of the class, or was kept as a negative
    dead        neither, for any image of the window (the steps since the last evaluation)
    similarity  histograms of kept positives and kept negatives, 100 bins over [-1, 1], from logged steps

With N = 1 a dead proxy is one whose class had no image and that no image kept. With more, every image of the class
keeps and moves all N; one that is never the nearest is redundant.

The rank that owns a class keeps its proxies' marks: a flag and an int32, 5 bytes per proxy over all ranks, written by
one scatter per step on the device, without synchronisation. Nothing crosses ranks until the statistics are read; then
only counts do. Where the bank is gathered, a rank sees its own images against all proxies, so it keeps marks of all
proxies, which are summed at the evaluation. Counts are integers, so they are the same for any number of ranks. The loss
and its gradients are not affected.

Declined: keeping the window in checkpoints. A resumed run starts a new one; `window_steps` is its length.

Dimension key: N proxies per class, p visible proxies, n kept pairs, o images whose class is visible, h histogram bins.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dist_proxygml.distributed.collectives import all_reduce_sum, gather_objects, gather_rows
from dist_proxygml.head.bank import Pairs
from dist_proxygml.head.classification import KeptMatrix, KeptPairs
from dist_proxygml.head.partition import ClassPartition
from dist_proxygml.storage.files import publish_text

NUM_BINS = 100
NUM_EXAMPLES = 20
NUM_SAMPLED = 10_000
DEAD_DEFINITION = (
    "in the steps of the window no image of its class had it as the nearest proxy of the class, and no image kept it "
    "as a negative"
)

_PROXIES_LOOKED_AT = 1 << 20  # of the listed examples


class SimilarityCounts(NamedTuple):
    """Number of kept pairs in each bin, over all ranks."""

    positive: list[int]
    negative: list[int]


@dataclass(frozen=True)
class ProxyUse:
    """Proxy use in a window, over all ranks; the same on every rank."""

    num_classes: int
    per_class: int
    window_steps: int
    num_images: int
    num_dead: int
    dead_examples: list[tuple[int, int]]
    """The first dead proxies as (class, proxy of the class)."""
    similarities: SimilarityCounts


class SampledProxies(NamedTuple):
    """A strided sample of the proxies, on every rank."""

    norm: Tensor
    """Their lengths [s]."""
    times_kept: Tensor
    """How often each was kept as a negative in the window, int64 [s]."""


class _Marks(NamedTuple):
    """Marks of the visible proxies."""

    is_nearest: Tensor  # bool [p]
    times_kept: Tensor  # int32 [p]


class ProxyStatistics:
    """Statistics of one rank's proxies; set `observe` as the observer of the loss.

    Args:
        partition: the classes of this rank.
        proxies_per_class: N.
        device: where the loss works.
        group: the ranks over which the classes are partitioned; None for one process.
    """

    def __init__(
        self,
        partition: ClassPartition,
        proxies_per_class: int,
        *,
        device: torch.device,
        group: dist.ProcessGroup | None,
    ) -> None:
        self._partition = partition
        self._per_class = proxies_per_class
        self._device = device
        self._group = group
        self._is_logged = False
        self._num_images: int | Tensor = 0  # a tensor where counting it would wait for the device
        self._recent_2h = self._no_counts()
        self._start_window()

    def begin_step(self, *, is_logged: bool) -> None:
        """Begin a step, to which the next forward passes belong; similarities are counted in logged steps."""
        self._num_steps += 1
        self._is_logged = is_logged

    def observe(self, kept: KeptPairs | KeptMatrix) -> None:
        """Record the pairs that a forward pass kept. No collective; no synchronisation with the device, but for those
        of a matrix in a logged step.
        """
        if isinstance(kept, KeptMatrix):
            self._mark(kept)
            if self._is_logged:
                self._count_similarities(kept.positives, kept.negatives)
            return
        positive, negative = kept.positives, kept.negatives
        nearest_o1 = positive.similarity.view(-1, self._per_class).argmax(dim=1, keepdim=True)
        proxy_o = positive.proxy.view(-1, self._per_class).gather(1, nearest_o1).flatten()
        self._num_images += len(proxy_o)  # each image is seen with its class on one rank only
        marks = self._marks_of(kept.partition)
        marks.is_nearest.index_fill_(0, proxy_o, True)
        marks.times_kept.index_add_(0, negative.proxy, torch.ones_like(negative.proxy, dtype=torch.int32))
        if self._is_logged:
            self._count_similarities(positive, negative)

    def _mark(self, kept: KeptMatrix) -> None:
        marks = self._marks_of(kept.partition)
        proxy_R = kept.own_similarity.argmax(dim=1).add_(kept.own_class, alpha=self._per_class)
        if kept.is_here is None:
            self._num_images = self._num_images + len(proxy_R)
            marks.is_nearest.index_fill_(0, proxy_R, True)
        else:
            self._num_images = self._num_images + kept.is_here.sum()
            times_nearest_p = torch.zeros_like(marks.times_kept).index_add_(0, proxy_R, kept.is_here.int())
            marks.is_nearest.logical_or_(times_nearest_p)
        marks.times_kept.add_(kept.is_kept.sum(dim=0, dtype=torch.int32))

    def _count_similarities(self, positive: Pairs, negative: Pairs) -> None:
        for counts_h, pairs in zip(self._recent_2h, (positive, negative), strict=True):
            bin_n = ((pairs.similarity + 1) * (NUM_BINS / 2)).long().clamp_(0, NUM_BINS - 1)
            counts_h.index_add_(0, bin_n, torch.ones_like(bin_n))

    def take_similarities(self) -> SimilarityCounts:
        """Return and reset the histograms of the logged steps since the last call. Called on all ranks."""
        counts_2h = all_reduce_sum(self._recent_2h, group=self._group)
        self._window_2h += counts_2h
        self._recent_2h = self._no_counts()
        return SimilarityCounts(*counts_2h.tolist())

    def sample(self, proxies_cND: Tensor) -> SampledProxies:
        """Sample at most NUM_SAMPLED of all ranks' proxies, the same for any number of ranks. Called on all ranks."""
        counts = [count * self._per_class for count in self._partition.counts()]
        stride = -(-sum(counts) // NUM_SAMPLED)
        first_W = [-sum(counts[:rank]) % stride for rank in range(len(counts))]
        rows = [len(range(first, count, stride)) for first, count in zip(first_W, counts, strict=True)]
        own = slice(first_W[self._partition.rank], None, stride)
        norm_s = torch.linalg.vector_norm(proxies_cND.flatten(0, 1)[own].float(), dim=1)
        sampled = (norm_s, self._own_marks().times_kept[own].long())
        return SampledProxies(*(gather_rows(part, row_counts=rows, group=self._group) for part in sampled))

    def close_window(self) -> ProxyUse:
        """Return the proxy use of the window and begin the next. Called on all ranks."""
        self.take_similarities()
        marks = self._own_marks()
        is_dead_p = ~marks.is_nearest & (marks.times_kept == 0)
        first = self._partition.start * self._per_class
        dead = [first + proxy for proxy in _first_true(is_dead_p, NUM_EXAMPLES)]
        parts = gather_objects((int(is_dead_p.sum()), int(self._num_images), dead), group=self._group)
        examples = sorted(proxy for _, _, dead in parts for proxy in dead)[:NUM_EXAMPLES]
        use = ProxyUse(
            num_classes=self._partition.num_classes,
            per_class=self._per_class,
            window_steps=self._num_steps,
            num_images=sum(num_images for _, num_images, _ in parts),
            num_dead=sum(num_dead for num_dead, _, _ in parts),
            dead_examples=[divmod(proxy, self._per_class) for proxy in examples],
            similarities=SimilarityCounts(*self._window_2h.tolist()),
        )
        self._start_window()
        return use

    @property
    def window_steps(self) -> int:
        """Steps of the window so far."""
        return self._num_steps

    def _start_window(self) -> None:
        self._num_steps = 0
        self._num_images = 0
        self._window_2h = self._no_counts()
        self._own = self._no_marks(self._partition.num_local)
        self._gathered: _Marks | None = None

    def _marks_of(self, partition: ClassPartition) -> _Marks:
        if partition == self._partition:
            return self._own
        if self._gathered is None:
            self._gathered = self._no_marks(partition.num_local)
        return self._gathered

    def _own_marks(self) -> _Marks:
        """Return the marks of this rank's proxies, including those that other ranks made where the bank was gathered.
        Called on all ranks, which gathered it at the same steps.
        """
        if self._gathered is not None:
            first, num = self._partition.start * self._per_class, self._partition.num_local * self._per_class
            is_nearest_p, times_kept_p = (
                all_reduce_sum(part.int(), group=self._group)[first : first + num] for part in self._gathered
            )
            self._own = _Marks(self._own.is_nearest | (is_nearest_p > 0), self._own.times_kept + times_kept_p)
            self._gathered = None
        return self._own

    def _no_marks(self, num_classes: int) -> _Marks:
        num_proxies = num_classes * self._per_class
        return _Marks(
            torch.zeros(num_proxies, dtype=torch.bool, device=self._device),
            torch.zeros(num_proxies, dtype=torch.int32, device=self._device),
        )

    def _no_counts(self) -> Tensor:
        return torch.zeros(2, NUM_BINS, dtype=torch.int64, device=self._device)


def bin_edges() -> list[float]:
    """Return the bin edges of the histograms, one more than bins."""
    return [round(-1 + 2 * edge / NUM_BINS, 6) for edge in range(NUM_BINS + 1)]


def write_proxy_use(path: Path, use: ProxyUse, *, step: int, names_of: Callable[[Sequence[int]], list[str]]) -> None:
    """Write the proxy use of a window as JSON, atomically. On rank 0 only.

    Args:
        path: the file; its folder is created.
        use: the proxy use.
        step: completed steps of the run.
        names_of: maps class ids to names.
    """
    names = names_of([label for label, _ in use.dead_examples])
    edges = bin_edges()
    document: dict[str, Any] = {
        "step": step,
        "num_classes": use.num_classes,
        "per_class": use.per_class,
        "window_steps": use.window_steps,
        "num_images": use.num_images,
        "num_dead": use.num_dead,
        "dead_definition": DEAD_DEFINITION,
        "dead_examples": [
            {"class": label, "proxy": proxy, "name": name}
            for (label, proxy), name in zip(use.dead_examples, names, strict=True)
        ],
        "kept_positive": {"edges": edges, "counts": use.similarities.positive},
        "kept_negative": {"edges": edges, "counts": use.similarities.negative},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    publish_text(path, json.dumps(document, indent=2) + "\n")


def _first_true(is_true_p: Tensor, most: int) -> list[int]:
    """Return the indices of the first True entries."""
    found: list[int] = []
    for first in range(0, len(is_true_p), _PROXIES_LOOKED_AT):
        chunk = is_true_p[first : first + _PROXIES_LOOKED_AT].nonzero().flatten()
        found += (chunk[: most - len(found)] + first).tolist()
        if len(found) == most:
            break
    return found
