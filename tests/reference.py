"""The oracle: ProxyGML written from its equations, one image and one proxy at a time, in float64.

Chosen: Python loops and the textbook forms, so that a reader can check each line against the paper
(arXiv 2010.13636, section 3); no rank, no chunk, no shifted exponentials. Declined: speed.
Gradients come from autograd.

    similarity           S[i, j] = x_i . u_j,   u_j = p_j / |p_j|
    subgraph of image i  its own N proxies, then k - N others by (S descending, index ascending)
    label propagation    Z[i, c] = sum of S[i, j] over the kept proxies j of class c
    classification       mean_i( log sum_{c with a kept proxy} exp(s Z[i, c]) - s Z[i, y_i] )
    regularization       mean_j( log sum_c exp(R[j, c]) - R[j, class of j] ),
                         R[j, c] = u_j . (sum of u_l over the proxies l of class c)
    total                classification + lambda * regularization

Dimension key: B images, C classes, N proxies per class, P = C*N proxies, D embedding.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class ReferenceTerms(NamedTuple):
    """The loss of a global batch, scalars to differentiate; mean number of kept classes."""

    total: Tensor
    classification: Tensor
    regularization: Tensor
    kept_classes: float


class ReferenceResult(NamedTuple):
    """Terms of the loss with the gradients of `total`; all float64."""

    terms: ReferenceTerms
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


def reference_loss(
    embeddings_BD: Tensor,
    labels_B: Tensor,
    proxies_CND: Tensor,
    *,
    topk: int,
    regularization_weight: float = 0.0,
    scale: float = 1.0,
) -> ReferenceTerms:
    """The terms of ProxyGML for a global batch, differentiable in embeddings and proxies."""
    assert embeddings_BD.dtype == proxies_CND.dtype == torch.float64
    num_classes, proxies_per_class, dim = proxies_CND.shape
    unit_PD = (proxies_CND / proxies_CND.norm(dim=2, keepdim=True)).reshape(-1, dim)
    class_of = [c for c in range(num_classes) for _ in range(proxies_per_class)]

    losses: list[Tensor] = []
    kept_classes: list[int] = []
    for x_D, label in zip(embeddings_BD, labels_B.tolist(), strict=True):
        similarity_P = unit_PD @ x_D
        positive = [c == label for c in class_of]
        kept = kept_proxies(similarity_P.tolist(), positive, topk=topk)
        scores: dict[int, Tensor] = {}
        for j in range(len(class_of)):
            if kept[j]:
                scores[class_of[j]] = scores.get(class_of[j], 0.0) + similarity_P[j]
        total = torch.stack([torch.exp(scale * z) for z in scores.values()]).sum()
        losses.append(torch.log(total) - scale * scores[label])
        kept_classes.append(len(scores))
    classification = torch.stack(losses).mean()

    class_sums_CD = unit_PD.reshape(num_classes, proxies_per_class, dim).sum(dim=1)
    losses = []
    for j, c in enumerate(class_of):
        scores_C = class_sums_CD @ unit_PD[j]
        losses.append(torch.log(torch.exp(scores_C).sum()) - scores_C[c])
    regularization = torch.stack(losses).mean()

    total = classification + regularization_weight * regularization
    return ReferenceTerms(total, classification, regularization, sum(kept_classes) / len(kept_classes))


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
    terms = reference_loss(
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
