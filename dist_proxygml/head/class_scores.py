"""A class's score from the similarities of its proxies, and the slope of the score in each of them.

    sum        sum of the similarities: reverse label propagation, as in ProxyGML
    softmax    sum of softmax(similarity / gamma) * similarity: Qian et al., "SoftTriple Loss", ICCV 2019 (arXiv
               1909.05235), eq. 6
    max        the largest; of equal ones, that of the lowest index

With one proxy per class all three are its similarity. A slope of None is 1 everywhere.

Dimension key: n kept pairs, g groups of adjacent pairs of one image and one class; N proxies per class.
"""

from typing import Literal

import torch
from torch import Tensor

ClassScore = Literal["sum", "softmax", "max"]


def scores(similarity: Tensor, *, dim: int, how: ClassScore, gamma: float) -> tuple[Tensor, Tensor | None]:
    """Return the scores of classes whose N proxies lie along `dim`, and the slopes, of the similarities' shape."""
    if similarity.shape[dim] == 1:
        return similarity.squeeze(dim), None
    if how == "sum":
        return similarity.sum(dim), None
    if how == "max":
        index = similarity.argmax(dim, keepdim=True)  # of equal ones the first
        return similarity.gather(dim, index).squeeze(dim), torch.zeros_like(similarity).scatter_(dim, index, 1.0)
    weight = torch.softmax(similarity / gamma, dim)
    score = (weight * similarity).sum(dim, keepdim=True)
    return score.squeeze(dim), weight * (1 + (similarity - score) / gamma)


def masked_scores(
    similarity: Tensor, is_kept: Tensor, *, how: ClassScore, gamma: float
) -> tuple[Tensor, Tensor | None]:
    """Return the scores of classes whose N proxies lie along the last dimension, from those that are kept, and the
    slopes; both 0 where none is. A slope of None is 1 where it is kept.
    """
    values = torch.where(is_kept, similarity, 0)
    if similarity.shape[-1] == 1:
        return values.squeeze(-1), None
    if how == "sum":
        return values.sum(-1), None
    lowest = torch.finfo(similarity.dtype).min
    if how == "max":
        masked = torch.where(is_kept, similarity, lowest)
        slope = torch.zeros_like(similarity).scatter_(-1, masked.argmax(-1, keepdim=True), 1.0) * is_kept
        return (slope * values).sum(-1), slope
    weight = torch.softmax(torch.where(is_kept, similarity / gamma, lowest), -1) * is_kept
    score = (weight * values).sum(-1, keepdim=True)
    return score.squeeze(-1), weight * (1 + (values - score) / gamma)


def scores_of_groups(
    similarity_n: Tensor, group_n: Tensor, num_groups: int, *, how: ClassScore, gamma: float
) -> tuple[Tensor, Tensor | None]:
    """Return the scores [g] of groups of adjacent pairs, of any size, and the slopes [n]."""
    if how == "sum":
        return similarity_n.new_zeros(num_groups).index_add_(0, group_n, similarity_n), None
    lowest_g = similarity_n.new_full((num_groups,), -torch.inf)
    largest_g = lowest_g.scatter_reduce(0, group_n, similarity_n, "amax")
    if how == "max":
        is_largest_n = similarity_n == largest_g[group_n]
        order_n = is_largest_n.cumsum(0)
        before_g = torch.full_like(group_n[:1], len(group_n)).expand(num_groups).clone()
        before_g.scatter_reduce_(0, group_n, order_n - is_largest_n.long(), "amin")
        is_first_n = is_largest_n & (order_n - before_g[group_n] == 1)
        return largest_g, is_first_n.to(similarity_n.dtype)
    weight_n = ((similarity_n - largest_g[group_n]) / gamma).exp()
    total_g = similarity_n.new_zeros(num_groups).index_add_(0, group_n, weight_n)
    weight_n = weight_n / total_g[group_n]
    score_g = similarity_n.new_zeros(num_groups).index_add_(0, group_n, weight_n * similarity_n)
    return score_g, weight_n * (1 + (similarity_n - score_g[group_n]) / gamma)
