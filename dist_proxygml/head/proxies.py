"""Initialisation of the proxy bank: a rank's proxies as one tensor [classes, proxies per class, D].

Three initialisations, each giving the same numbers on any number of ranks:

    published    uniform in +-1/sqrt(C*N) with the GLOBAL number of proxies, unnormalised
    unit         random directions of length 1
    class mean   the mean embedding of each class's images, of length 1

The published bound shrinks with the number of proxies while the loss depends on directions only, so with very many
classes a proxy's first gradient, which grows as 1/length, throws it far away. The other two start at length 1.

Random proxies are drawn in blocks of global classes, each from its own generator, so that a rank draws only the blocks
it owns. Seeding per process would repeat vectors across ranks, or make them depend on the world size. Class means are
summed batch by batch, each rank for its own classes. Declined: a [C, D] matrix on every rank, k-means for the N proxies
of a class.

Dimension key: b images of this rank's batch, B of all ranks' batches, c classes of this rank, C classes, x classes of a
block, N proxies per class, D embedding.
"""

import math
from collections.abc import Iterable
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dist_proxygml.distributed.collectives import AgreedError, gather_rows
from dist_proxygml.distributed.parallel import ParallelContext, all_gather_object, run_together
from dist_proxygml.head.partition import ClassPartition

_CLASSES_PER_BLOCK = 1024
# Length of the random offsets of a class's N proxies when they start from one mean: 0.1 turns them by 6 degrees.
_SPREAD = 0.1


def initial_proxies(
    partition: ClassPartition,
    proxies_per_class: int,
    embedding_dim: int,
    *,
    seed: int,
    initialization: Literal["published", "unit"] = "published",
) -> Tensor:
    """Draw random proxies of this rank's classes, float32 [c, N, D]; a pure function of global class ids and seed.

    Args:
        partition: the classes of this rank.
        proxies_per_class: N.
        embedding_dim: D.
        seed: the same on all ranks.
        initialization: "published": uniform in +-1/sqrt(C*N); "unit": directions uniform on the sphere, of length 1.
    """
    bound = 1 / math.sqrt(partition.num_classes * proxies_per_class)
    proxies_cND = torch.empty(partition.num_local, proxies_per_class, embedding_dim)
    block = partition.start // _CLASSES_PER_BLOCK
    while (first := block * _CLASSES_PER_BLOCK) < partition.stop:
        entropy = np.random.SeedSequence([seed, block]).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(entropy >> 1))
        size = min(_CLASSES_PER_BLOCK, partition.num_classes - first)
        drawn = torch.empty(size, proxies_per_class, embedding_dim)
        if initialization == "unit":
            drawn = F.normalize(drawn.normal_(generator=generator), dim=2)
        else:
            drawn.uniform_(-bound, bound, generator=generator)
        start, stop = max(first, partition.start), min(first + size, partition.stop)
        proxies_cND[start - partition.start : stop - partition.start] = drawn[start - first : stop - first]
        block += 1
    return proxies_cND


def replace_by_class_means_(
    proxies_cND: Tensor,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    num_batches: int,
    partition: ClassPartition,
    context: ParallelContext,
) -> None:
    """Replace this rank's "unit" initial proxies by class means, in place. Called on all ranks.

    With N = 1 a proxy becomes the normalised mean embedding of its class's images. With more, each of a class's proxies
    is offset from that by a tenth of its own random direction, so that they differ. A class without images, or whose
    images cancel out, keeps its random directions. Sums are float64, so that their order, which depends on the number
    of ranks, changes at most the last bit of float32. Memory beyond the proxies: 8 bytes * c * D.

    Args:
        proxies_cND: the "unit" initialisation of this rank's classes; overwritten.
        batches: this rank's images as (embeddings float32 [b, D], labels int64 [b] of any classes) on the device of the
            proxies; the ranks' batches together hold each image once.
        num_batches: length of `batches`; it may differ by rank and be 0.
        partition: the classes of this rank.
        context: this process among its peers.

    Raises:
        ValueError: on every rank, if a batch cannot be read or an embedding is not finite.
    """
    num_classes, proxies_per_class, embedding_dim = proxies_cND.shape
    device = proxies_cND.device
    nothing = torch.zeros(0, embedding_dim, device=device), torch.zeros(0, dtype=torch.int64, device=device)

    # 1. Sums of this rank's classes over the images of all ranks.
    sums_cD = torch.zeros(num_classes, embedding_dim, dtype=torch.float64, device=device)
    iterator = iter(batches)
    for _ in range(max(all_gather_object(context, num_batches))):
        embeddings_bD, labels_b = run_together(context, next, iterator, nothing)
        row_counts = all_gather_object(context, len(labels_b))
        embeddings_BD = gather_rows(embeddings_bD, row_counts=row_counts, group=context.group)
        labels_B = gather_rows(labels_b, row_counts=row_counts, group=context.group)
        if not bool(embeddings_BD.isfinite().all()):  # the same rows on every rank, so all raise together
            raise AgreedError(
                "expected finite embeddings to take class means of, got NaN or infinity; look at the backbone's "
                'initial weights, or set proxies.initialization to "unit"'
            )
        is_own_B = (partition.start <= labels_B) & (labels_B < partition.stop)
        sums_cD.index_add_(0, labels_B[is_own_B] - partition.start, embeddings_BD[is_own_B].double())

    # 2. Directions, block by block of classes, so that the bank is not copied.
    for sums_xD, proxies_xND in zip(
        sums_cD.split(_CLASSES_PER_BLOCK), proxies_cND.split(_CLASSES_PER_BLOCK), strict=True
    ):
        means_xND = F.normalize(sums_xD, dim=1).float()[:, None].expand_as(proxies_xND)
        if proxies_per_class > 1:
            means_xND = F.normalize(means_xND + _SPREAD * proxies_xND, dim=2)
        proxies_xND.copy_(torch.where(sums_xD.any(dim=1)[:, None, None], means_xND, proxies_xND))
