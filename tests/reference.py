"""What the tests hold the loss to: `dist_proxygml.head.reference` with its gradients, the subgraph and Adam by hand.

Chosen: float64, and Python loops for what a reader should check against the paper line by line: which proxies an image
keeps, and what one step of Adam does. Declined: speed. Gradients of the loss come from autograd.

Dimension key: B images, C classes, N proxies per class, D embedding.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dist_proxygml.head.reference import LossTerms, proxygml_loss


class ReferenceResult(NamedTuple):
    """Terms of the loss with the gradients of `total`; all float64."""

    terms: LossTerms
    grad_embeddings: Tensor  # [B, D]
    grad_proxies: Tensor  # [C, N, D]


def num_kept(*, ratio: float, num_classes: int, proxies_per_class: int) -> int:
    """k = ceil(r*C*N), in floating point and in this order as published (0.1 * 3 * 10 keeps 4)."""
    return math.ceil(ratio * num_classes * proxies_per_class)


def kept_proxies(similarity: Sequence[float], positive: Sequence[bool], *, topk: int) -> list[bool]:
    """The subgraph of one image: every positive, then the best negatives until `topk` are kept."""
    kept = list(positive)
    negatives = [j for j in range(len(similarity)) if not positive[j]]
    negatives.sort(key=lambda j: (-similarity[j], j))
    for j in negatives[: max(0, topk - sum(kept))]:
        kept[j] = True
    return kept


def reference_gradients(
    embeddings_BD: Tensor,
    labels_B: Tensor,
    proxies_CND: Tensor,
    *,
    topk: int,
    regularization_weight: float = 0.0,
    scale: float = 1.0,
    of: str = "total",
) -> ReferenceResult:
    """The terms and the gradients of the term named `of` with respect to embeddings and proxies."""
    embeddings_BD = embeddings_BD.detach().double().requires_grad_()
    proxies_CND = proxies_CND.detach().double().requires_grad_()
    terms = proxygml_loss(
        embeddings_BD,
        labels_B,
        proxies_CND,
        topk=topk,
        regularization_weight=regularization_weight,
        scale=scale,
    )
    grad_embeddings, grad_proxies = torch.autograd.grad(
        getattr(terms, of),
        (embeddings_BD, proxies_CND),
        allow_unused=True,
        materialize_grads=True,
    )
    return ReferenceResult(terms, grad_embeddings, grad_proxies)


class ReferenceAdam:
    """Adam as published (Kingma and Ba 2015, algorithm 1), weight decay added to the gradient."""

    def __init__(self, *, lr: float, eps: float, weight_decay: float) -> None:
        self.lr, self.eps, self.weight_decay = lr, eps, weight_decay
        self.beta_1, self.beta_2 = 0.9, 0.999
        self.num_steps = 0
        self.first: Tensor | float = 0.0
        self.second: Tensor | float = 0.0

    def step(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        """The parameter after one more step."""
        self.num_steps += 1
        gradient = gradient + self.weight_decay * parameter
        self.first = self.beta_1 * self.first + (1 - self.beta_1) * gradient
        self.second = self.beta_2 * self.second + (1 - self.beta_2) * gradient**2
        first = self.first / (1 - self.beta_1**self.num_steps)
        second = self.second / (1 - self.beta_2**self.num_steps)
        return parameter - self.lr * first / (second**0.5 + self.eps)
