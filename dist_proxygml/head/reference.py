"""ProxyGML as a plain dense function on one process: the definition. Start here; loss.py computes the same at scale.

Every tensor of the paper is written out, including the similarities [B, P] and the scores [B, C]; autograd does the
rest. Declined: anything that makes it fast, small or distributed. tests/parity checks it against numbers recorded from
the authors' code, and the tests of loss.py check that against this.

Source: Zhu et al., "Fewer is More: A Deep Graph Metric Learning Perspective Using Fewer Proxies", NeurIPS 2020 (arXiv
2010.13636), section 3.

Dimension key: B images, C classes, N proxies per class, P = C*N proxies, D embedding.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class LossTerms(NamedTuple):
    """The loss of one global batch; scalars, the same numbers on every rank."""

    total: Tensor
    """classification + regularization_weight * regularization; call backward on this one."""
    classification: Tensor
    """Mean masked-softmax loss over the global batch."""
    regularization: Tensor
    """Mean cross entropy of the proxies against the class sums; 0 when its weight is 0."""
    kept_classes: Tensor
    """Mean number of classes per image with a kept proxy; no gradient."""


def proxygml_loss(
    embeddings_BD: Tensor,
    labels_B: Tensor,
    proxies_CND: Tensor,
    *,
    topk: int,
    regularization_weight: float = 0.0,
    scale: float = 1.0,
) -> LossTerms:
    """Compute the loss of a batch, differentiable in embeddings and proxies.

    Args:
        embeddings_BD: unit rows, floating point.
        labels_B: int64 class ids.
        proxies_CND: of any non-zero length, in the precision of the embeddings.
        topk: k, the number of proxies kept per image, including its own N; N < k <= P.
        regularization_weight: lambda.
        scale: softmax scale s of the classification term.
    """
    num_classes, per_class, _ = proxies_CND.shape
    unit_CND = proxies_CND / proxies_CND.norm(dim=2, keepdim=True)
    # 1. Cosine similarities.
    similarity_BCN = torch.einsum("bd,cnd->bcn", embeddings_BD, unit_CND)
    # 2. Relation-guided subgraph: the image's own proxies, then the most similar others; ties go to the lower index.
    is_own_BC1 = F.one_hot(labels_B, num_classes).bool()[:, :, None]
    order_BP = similarity_BCN.masked_fill(is_own_BC1, torch.inf).flatten(1).argsort(stable=True, dim=1, descending=True)
    kept_BP = torch.zeros_like(order_BP, dtype=torch.bool).scatter(1, order_BP[:, :topk], True)
    kept_BCN = kept_BP.view_as(similarity_BCN)
    # 3. Reverse label propagation: a class scores the sum of its kept similarities.
    scores_BC = torch.where(kept_BCN, similarity_BCN, 0).sum(dim=2)
    # 4. Masked softmax over the classes with a kept proxy.
    is_kept_BC = kept_BCN.any(dim=2)
    classification = F.cross_entropy((scale * scores_BC).masked_fill(~is_kept_BC, -torch.inf), labels_B)
    # 5. Proxy regularizer: every proxy is classified by its similarity to the sum of each class's proxies.
    proxy_scores_PC = unit_CND.flatten(0, 1) @ unit_CND.sum(dim=1).T
    owners_P = torch.arange(num_classes, device=labels_B.device).repeat_interleave(per_class)
    regularization = F.cross_entropy(proxy_scores_PC, owners_P)

    total = classification + regularization_weight * regularization
    return LossTerms(total, classification, regularization, is_kept_BC.sum(dim=1).to(total.dtype).mean())


def proxy_loss(
    embeddings_BD: Tensor,
    labels_B: Tensor,
    proxies_CND: Tensor,
    *,
    topk: int | None = None,
    drawn_C: Tensor | None = None,
    class_score: str = "sum",
    gamma: float = 0.1,
    margin: Callable[[Tensor], Tensor] = lambda score_B: score_B,
    scale: float | Tensor = 1.0,
) -> Tensor:
    """Compute the classification term of any head (choices.py) as a definition, differentiable in all floating inputs.

    Args:
        embeddings_BD, labels_B, proxies_CND: as in `proxygml_loss`.
        topk: k of a top-k head; None: the proxies of all classes compete, or of those drawn.
        drawn_C: bool, the classes drawn in this step; those of the batch compete, too.
        class_score: "sum", "softmax" or "max" of a class's competing similarities.
        gamma: temperature of the softmax over a class's proxies.
        margin: psi, from the score of the own class to the one that is compared.
        scale: s.
    """
    num_classes = len(proxies_CND)
    similarity_BCN = torch.einsum("bd,cnd->bcn", embeddings_BD, proxies_CND / proxies_CND.norm(dim=2, keepdim=True))
    is_own_BC = F.one_hot(labels_B, num_classes).bool()
    competes_BCN = torch.ones_like(similarity_BCN, dtype=torch.bool)
    if topk is not None:
        ranked_BCN = similarity_BCN.masked_fill(is_own_BC[:, :, None], torch.inf)
        order_BP = ranked_BCN.flatten(1).argsort(stable=True, dim=1, descending=True)
        is_kept_BP = torch.zeros_like(order_BP, dtype=torch.bool).scatter(1, order_BP[:, :topk], True)
        competes_BCN = is_kept_BP.view_as(similarity_BCN)
    elif drawn_C is not None:
        competes_BCN = (drawn_C | is_own_BC.any(dim=0))[None, :, None].expand_as(similarity_BCN)
    masked_BCN = similarity_BCN.masked_fill(~competes_BCN, -torch.inf)
    is_in_BC = competes_BCN.any(dim=2)
    if class_score == "sum":
        score_BC = similarity_BCN.where(competes_BCN, 0).sum(dim=2)
    elif class_score == "max":
        score_BC = masked_BCN.max(dim=2).values.where(is_in_BC, 0)
    else:
        weight_BCN = torch.softmax((masked_BCN / gamma).masked_fill(~is_in_BC[:, :, None], 0), dim=2)
        score_BC = (weight_BCN * similarity_BCN).sum(dim=2)
    score_BC = torch.where(is_own_BC, margin(score_BC), score_BC)
    return F.cross_entropy((scale * score_BC).masked_fill(~is_in_BC, -torch.inf), labels_B)
