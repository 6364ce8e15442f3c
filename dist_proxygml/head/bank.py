"""A rank's proxies in the form that the loss uses, and pairs of an image and a proxy.

Proxies are stored and multiplied unnormalised; similarities are divided by the proxies' lengths afterwards, which saves
a normalised copy of the bank.

Dimension key: p proxies, n pairs, D embedding.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

NORM_FLOOR = 1e-12  # lower bound of a proxy's length, as in torch.nn.functional.normalize


class Pairs(NamedTuple):
    """Pairs of an image and a proxy, sorted by row, then by proxy."""

    row: Tensor
    """int64 [n]."""
    proxy: Tensor
    """int64 [n], index into the bank."""
    similarity: Tensor
    """[n]."""


@dataclass
class FusedSearches:
    """What became of the searches by the kernels of fused.py; counted on the host, which knows it anyway."""

    done: int = 0
    given_up: int = 0
    """Of them, those with more pairs than fit the budget, which torch's operators did again."""


class Bank(NamedTuple):
    """Proxies to compare with."""

    proxies: Tensor
    """[p, D], unnormalised."""
    inverse_norm: Tensor
    """[p], inverse lengths."""
    matmul_dtype: torch.dtype = torch.float32
    """bfloat16 rounds the inputs of products; sums keep the precision of the proxies."""
    fused: bool = False
    """Whether to use the kernels of fused.py."""
    searches: FusedSearches | None = None
    """Where to count those of the kernels."""


def build_bank(
    proxies_pD: Tensor,
    *,
    matmul_dtype: torch.dtype = torch.float32,
    fused: bool = False,
    searches: FusedSearches | None = None,
) -> Bank:
    """Build a bank from unnormalised proxies [p, D]; lengths are clamped to at least 1e-12, as in F.normalize.

    The inverse length of a proxy with a NaN or infinite element is NaN.
    """
    norm_p = torch.linalg.vector_norm(proxies_pD, dim=1)
    norm_p.add_(norm_p, alpha=0)  # infinity becomes NaN: it times 0 is
    return Bank(proxies_pD, norm_p.clamp_min_(NORM_FLOOR).reciprocal_(), matmul_dtype, fused, searches)
