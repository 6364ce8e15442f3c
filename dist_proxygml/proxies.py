"""The proxy bank: a rank's proxies as one parameter of shape [classes, proxies per class, D], stored unnormalised.

Initialisation is uniform in +-1/sqrt(C*N) with the GLOBAL number of proxies, as published. It is drawn in blocks of
global classes, each from its own generator, so that the bank is the same numbers on any number of ranks and a rank
draws only the blocks that it owns. Seeding by process instead would give other ranks the same vectors, or other world
sizes other vectors.

Dimension key: c classes of this rank, C classes, N proxies per class, D embedding.
"""

import math

import numpy as np
import torch
from torch import Tensor

from dist_proxygml.partition import ClassPartition

_CLASSES_PER_BLOCK = 1024


def initial_proxies(partition: ClassPartition, proxies_per_class: int, embedding_dim: int, *, seed: int) -> Tensor:
    """The published initialisation of this rank's proxies, float32 [c, N, D]; a pure function of the global class ids
    and seed.
    """
    bound = 1 / math.sqrt(partition.num_classes * proxies_per_class)
    proxies_cND = torch.empty(partition.num_local, proxies_per_class, embedding_dim)
    block = partition.start // _CLASSES_PER_BLOCK
    while (first := block * _CLASSES_PER_BLOCK) < partition.stop:
        entropy = np.random.SeedSequence([seed, block]).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(entropy >> 1))
        size = min(_CLASSES_PER_BLOCK, partition.num_classes - first)
        drawn = torch.empty(size, proxies_per_class, embedding_dim).uniform_(-bound, bound, generator=generator)
        start, stop = max(first, partition.start), min(first + size, partition.stop)
        proxies_cND[start - partition.start : stop - partition.start] = drawn[start - first : stop - first]
        block += 1
    return proxies_cND
