"""ProxyGML whose parts can be left out, for the table "Parts of the loss": the product has no switches for them.

Importing this module registers the loss as pytorch_metric_learning.losses.AblatedProxyGML, so that a run can name it,
loss.name=pml/AblatedProxyGML. With all parts it is the loss of dist_proxygml/head/reference.py, and starts from the
proxies of the product's head.

Source: Zhu et al., "Fewer is More", NeurIPS 2020 (arXiv 2010.13636), section 3. An image whose own class has no kept
proxy can only occur without forced positives. With the masked softmax its class then has probability 0, a constant
without gradient, so such an image's loss is 0 here. Without the mask every class takes part, and scores 0 where none of
its proxies is kept.

Dimension key: B images, C classes, N proxies per class, P = C*N proxies, D embedding.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pytorch_metric_learning import losses
from torch import Tensor, nn

from dist_proxygml.head.partition import ClassPartition
from dist_proxygml.head.proxies import initial_proxies
from dist_proxygml.head.selection import num_kept_proxies


class AblatedProxyGML(losses.BaseMetricLossFunction):  # type: ignore[misc]
    """The loss of a batch, dense, on one process.

    Args:
        num_classes, embedding_size: C and D.
        proxies_per_class: N.
        ratio: r; k = ceil(r*C*N) proxies are kept for each image.
        forced_positives: whether the image's own N proxies are always among them.
        masked_softmax: whether classes without a kept proxy take no part.
        regularization_weight: lambda; 0 leaves the regulariser out.
        scale: s.
        initialization, seed: of the proxies, as of the product's head.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        *,
        proxies_per_class: int = 1,
        ratio: float = 0.05,
        forced_positives: bool = True,
        masked_softmax: bool = True,
        regularization_weight: float = 0.0,
        scale: float = 1.0,
        initialization: Literal["published", "unit"] = "published",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.forced_positives, self.masked_softmax = forced_positives, masked_softmax
        self.regularization_weight, self.scale = regularization_weight, scale
        self.topk = num_kept_proxies(num_classes, proxies_per_class, ratio)
        all_classes = ClassPartition(num_classes)
        drawn_CND = initial_proxies(
            all_classes, proxies_per_class, embedding_size, seed=seed, initialization=initialization
        )
        self.proxies = nn.Parameter(drawn_CND)

    def forward(self, embeddings: Tensor, labels: Tensor, indices_tuple: Any = None) -> Tensor:
        """Compute the loss, a scalar, of unit rows [B, D] and class ids [B]; the third argument is not used."""
        num_classes, per_class, _ = self.proxies.shape
        unit_CND = F.normalize(self.proxies, dim=2)
        similarity_BCN = torch.einsum("bd,cnd->bcn", embeddings, unit_CND)
        # Relation-guided subgraph: S + S^pos, of which the k largest are kept.
        is_own_BC = F.one_hot(labels, num_classes).bool()
        ranked_BCN = similarity_BCN.detach()
        if self.forced_positives:
            ranked_BCN = ranked_BCN.masked_fill(is_own_BC[:, :, None], torch.inf)
        kept_BK = ranked_BCN.flatten(1).topk(self.topk, dim=1).indices
        kept_BP = torch.zeros_like(ranked_BCN.flatten(1), dtype=torch.bool).scatter(1, kept_BK, True)
        kept_BCN = kept_BP.view_as(similarity_BCN)
        # Reverse label propagation: a class scores the sum of its kept similarities.
        score_BC = self.scale * torch.where(kept_BCN, similarity_BCN, 0).sum(dim=2)
        # Masked softmax: over the classes with a kept proxy.
        if self.masked_softmax:
            score_BC = score_BC.masked_fill(~kept_BCN.any(dim=2), -torch.inf)
        has_own_B = score_BC[is_own_BC].isfinite()
        loss = F.cross_entropy(score_BC[has_own_B], labels[has_own_B], reduction="sum") / max(1, len(labels))
        if self.regularization_weight:
            # Proxy regulariser: every proxy is classified by its similarity to the sum of each class's proxies.
            score_PC = unit_CND.flatten(0, 1) @ unit_CND.sum(dim=1).T
            owners_P = torch.arange(num_classes, device=labels.device).repeat_interleave(per_class)
            loss = loss + self.regularization_weight * F.cross_entropy(score_PC, owners_P)
        return loss


setattr(losses, AblatedProxyGML.__name__, AblatedProxyGML)
