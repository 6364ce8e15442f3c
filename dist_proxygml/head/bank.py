"""A rank's proxies as the loss works with them, and the pairs of an image and a proxy that it works on.

Proxies are stored unnormalised, and so is what is multiplied: similarities are divided by the proxies' lengths, which
saves a normalised copy of the bank.

Dimension key: p proxies, n pairs, D embedding.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

NORM_FLOOR = 1e-12  # a shorter proxy is divided by this instead of its length, as torch.nn.functional.normalize does


class Pairs(NamedTuple):
    """Pairs of an image and a proxy, ordered by row, then by proxy."""

    row: Tensor
    """int64 [n]."""
    proxy: Tensor
    """int64 [n], index among the proxies at hand."""
    similarity: Tensor
    """[n]."""


class Bank(NamedTuple):
    """Proxies to compare with."""

    proxies: Tensor
    """[p, D], unnormalised."""
    inverse_norm: Tensor
    """[p], one over their lengths."""
    matmul_dtype: torch.dtype = torch.float32
    """bfloat16 rounds the inputs of the products to it; their sums stay in the precision of the proxies."""
    fused: bool = False
    """Whether the kernels of fused.py do the work."""


def build_bank(proxies_pD: Tensor, *, matmul_dtype: torch.dtype = torch.float32, fused: bool = False) -> Bank:
    """A bank of unnormalised proxies [p, D]; their lengths are at least 1e-12, as torch.nn.functional.normalize has it.

    A proxy that is NaN or infinite has an inverse length of NaN.
    """
    norm_p = torch.linalg.vector_norm(proxies_pD, dim=1)
    norm_p.masked_fill_(norm_p == math.inf, math.nan)
    return Bank(proxies_pD, norm_p.clamp_min_(NORM_FLOOR).reciprocal_(), matmul_dtype, fused)
