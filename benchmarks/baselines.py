"""What the head is measured against: the bare product, the published formulation, the heads that others use.

- `BareProduct`: X @ P.T, a chunk of proxies at a time, which no exact head can do without. Written as chunk @ X.T: the
  same numbers, and faster on CPUs, so the stricter denominator.
- `PublishedProxyGML`: the equations of the paper as dense matrices, 1000 added to the positives before the top-k, a 0/1
  mask, a one-hot matrix [P, C] for the sums over classes (built once, like the proxies).
- `ClassSoftmax`: softmax over all classes, divided over ranks by class, all logits of a rank at once, and optionally
  over a random share of the negative classes, in the manner of Partial FC (An et al., "Killing Two Birds with One
  Stone", CVPR 2022, arXiv 2203.15565).
- `metric_learning_loss`: NormalizedSoftmaxLoss, SoftTripleLoss and ProxyAnchorLoss of pytorch-metric-learning.

All but the first are modules: called with unit embeddings [B, D] and labels [B], they return the loss.

Dimension key: b/B images of this rank / over the group, c/C classes (lower case: of this rank, or the sampled ones of
them), N proxies per class, P proxies, D embedding, w proxies of a chunk.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from dist_proxygml.distributed.collectives import all_reduce_max, all_reduce_sum, gather_rows, rank_in, world_size_of
from dist_proxygml.head.matmul import product
from dist_proxygml.head.partition import ClassPartition

# Proxies of a chunk of the bare product: 8 MB of similarities at 64 images. Neither half nor twice as many is faster.
_CHUNK = 1 << 15
_SIMILARITIES_ON_GPU = 1 << 26

METRIC_LEARNING_LOSSES = {
    "normalized_softmax": "NormalizedSoftmaxLoss",
    "soft_triple": "SoftTripleLoss",
    "proxy_anchor": "ProxyAnchorLoss",
}


class BareProduct:
    """Every similarity X @ P.T once, each chunk written over the one before; no gradient.

    On a CPU chunks stay in its cache. A GPU gets as many proxies in one product as 256 MiB of similarities allow, and
    the bank in the type of the factors from the start: what it is compared with is the product at the GPU's limit, not
    the launches of small ones.

    Args:
        proxies_PD: the bank; not copied, but on a GPU where `matmul_dtype` is another type.
        batch_size: B.
        matmul_dtype: of the factors, on a CPU rounded chunk by chunk.
        onednn: by the product that the head uses on CPUs (head/matmul.py), instead of torch.mm; float32 only.
    """

    def __init__(self, proxies_PD: Tensor, *, batch_size: int, matmul_dtype: torch.dtype, onednn: bool = False) -> None:
        on_gpu = proxies_PD.device.type != "cpu"
        self.proxies_PD = proxies_PD.to(matmul_dtype) if on_gpu else proxies_PD
        self.onednn = onednn
        self.matmul_dtype = matmul_dtype
        self.chunk = max(_CHUNK, _SIMILARITIES_ON_GPU // batch_size) if on_gpu else _CHUNK
        self.similarity_wB = proxies_PD.new_empty(min(self.chunk, len(proxies_PD)), batch_size, dtype=matmul_dtype)

    @torch.no_grad()
    def __call__(self, embeddings_BD: Tensor) -> None:
        """Compute them all and keep none."""
        if self.onednn:
            for chunk_wD in self.proxies_PD.split(_CHUNK // 4):
                product(chunk_wD, embeddings_BD)
            return
        embeddings_DB = embeddings_BD.to(self.matmul_dtype).T
        for chunk_wD in self.proxies_PD.split(self.chunk):
            torch.mm(chunk_wD.to(self.matmul_dtype), embeddings_DB, out=self.similarity_wB[: len(chunk_wD)])


class PublishedProxyGML(nn.Module):
    """ProxyGML as published, densely; for one process.

    Args:
        proxies_PD: initial proxies, class by class; stored as columns, copied.
        num_classes: C.
        topk: k.
        regularization_weight: lambda.
    """

    def __init__(self, proxies_PD: Tensor, *, num_classes: int, topk: int, regularization_weight: float) -> None:
        super().__init__()
        self.topk = topk
        self.regularization_weight = regularization_weight
        self.proxies_DP = nn.Parameter(proxies_PD.T.contiguous())
        num_proxies = len(proxies_PD)
        proxy_P = torch.arange(num_proxies, device=proxies_PD.device)
        class_P = proxy_P // (num_proxies // num_classes)
        one_hot_PC = proxies_PD.new_zeros(num_proxies, num_classes)
        one_hot_PC[proxy_P, class_P] = 1
        self.register_buffer("class_P", class_P)
        self.register_buffer("one_hot_PC", one_hot_PC)

    def forward(self, embeddings_BD: Tensor, labels_B: Tensor) -> Tensor:
        """The loss; a scalar."""
        proxies_DP = F.normalize(self.proxies_DP, dim=0)
        similarity_BP = embeddings_BD @ proxies_DP
        # 1. the subgraph: the positives first, then the most similar
        priority_BP = similarity_BP.detach() + 1000 * (labels_B[:, None] == self.class_P)
        kept_BP = torch.zeros_like(similarity_BP).scatter_(1, priority_BP.topk(self.topk, dim=1).indices, 1)
        # 2. reverse label propagation, and a softmax over the classes whose score is not 0
        score_BC = (similarity_BP * kept_BP) @ self.one_hot_PC
        exp_BC = score_BC.exp() * (score_BC != 0)
        probability_BC = exp_BC / (exp_BC.sum(dim=1, keepdim=True) + 1e-8)
        loss = -(probability_BC.gather(1, labels_B[:, None]) + 1e-20).log().mean()
        # 3. every proxy classified against all proxies
        if self.regularization_weight > 0:
            score_PC = (proxies_DP.T @ proxies_DP) @ self.one_hot_PC
            loss = loss + self.regularization_weight * F.cross_entropy(score_PC, self.class_P)
        return loss


class ClassSoftmax(nn.Module):
    """Cross entropy over normalised class centres, divided over ranks by class; all logits of a rank at once.

    Called on all ranks of the group. Gradients: that of the centres is complete on its rank, those of the embeddings
    are to be summed over ranks by whoever reduces the backbone's.

    Args:
        num_classes: C, over all ranks.
        embedding_dim: D.
        scale: of the cosines.
        sampling_rate: expected share of a rank's classes that a step compares with, those of the batch always among
            them; 1 is the exact softmax.
        matmul_dtype: of the product's factors.
        group: ranks that the classes are divided over; None for one process.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        *,
        scale: float = 20.0,
        sampling_rate: float = 1.0,
        matmul_dtype: torch.dtype = torch.float32,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.partition = ClassPartition(num_classes, world_size_of(group), rank_in(group))
        self.scale = scale
        self.sampling_rate = sampling_rate
        self.matmul_dtype = matmul_dtype
        self.group = group
        self.centers_cD = nn.Parameter(torch.empty(self.partition.num_local, embedding_dim).normal_(std=0.01))

    def forward(self, embeddings_bD: Tensor, labels_b: Tensor) -> Tensor:
        """Mean loss of the global batch, the same on every rank. Each rank has a class and as many images as others."""
        row_counts = [len(labels_b)] * self.partition.world_size
        embeddings_BD = gather_rows(embeddings_bD, row_counts=row_counts, group=self.group)
        labels_B = gather_rows(labels_b, row_counts=row_counts, group=self.group) - self.partition.start
        owned_B = (labels_B >= 0) & (labels_B < self.partition.num_local)
        centers_cD, column_B = self.centers_cD, labels_B.where(owned_B, 0)
        if self.sampling_rate < 1:
            chosen_c = torch.rand(len(centers_cD), device=centers_cD.device) < self.sampling_rate
            chosen_c[labels_B[owned_B]] = True
            chosen_c[:1] = True  # a maximum needs a class
            centers_cD, column_B = centers_cD[chosen_c], (chosen_c.cumsum(dim=0) - 1)[column_B].clamp_min(0)
        unit_cD = F.normalize(centers_cD, dim=1).to(self.matmul_dtype)
        logits_Bc = self.scale * (embeddings_BD.to(self.matmul_dtype) @ unit_cD.T).float()
        row_max_B = all_reduce_max(logits_Bc.amax(dim=1), group=self.group)
        exp_sum_B = (logits_Bc - row_max_B[:, None]).exp().sum(dim=1)
        target_B = logits_Bc.gather(1, column_B[:, None])[:, 0].masked_fill(~owned_B, 0)
        exp_sum_B, target_B = all_reduce_sum(torch.stack([exp_sum_B, target_B]), group=self.group).unbind()
        return (exp_sum_B.log() + row_max_B - target_B).mean()


def metric_learning_loss(name: str, *, num_classes: int, proxies_per_class: int, embedding_dim: int) -> nn.Module:
    """A loss of pytorch-metric-learning with its own defaults; only SoftTriple has several centres per class.

    Raises:
        ImportError: pytorch-metric-learning is not installed.
    """
    from pytorch_metric_learning import losses

    options = {"centers_per_class": proxies_per_class} if name == "soft_triple" else {}
    return getattr(losses, METRIC_LEARNING_LOSSES[name])(num_classes, embedding_dim, **options)


def bytes_needed(
    head: str,
    *,
    batch_size: int,
    num_classes: int,
    proxies_per_class: int,
    embedding_dim: int,
    regularization_weight: float,
) -> int:
    """Least memory of a baseline's step with Adam: the bank four times (itself, gradient, two moments), and the largest
    matrices that exist together, all in float32.
    """
    num_proxies = num_classes * (proxies_per_class if head in ("published", "soft_triple") else 1)
    numbers = 4 * num_proxies * embedding_dim
    if head == "published":
        numbers += num_proxies * num_classes + 3 * batch_size * num_proxies
        if regularization_weight > 0:
            numbers += num_proxies * (num_proxies + num_classes)
    elif head == "proxy_anchor":  # positive and negative masks are int64
        numbers += 6 * batch_size * num_classes
    elif head != "sampled_softmax":
        numbers += 2 * batch_size * num_proxies
    return 4 * numbers
