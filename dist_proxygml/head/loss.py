"""The head: a class-partitioned proxy bank and a classification loss on it, exact for any number of ranks.

    S = X P^T                    cosine similarities of images and proxies (both unit rows)
    competing                    the top-k of each row over ALL proxies, always with the row's own N (selection.py); or
                                 all proxies; or those of a share of the classes, drawn anew in every step (sampling.py)
    z_c                          score of class c from its competing similarities (class_scores.py)
    nll = log sum_c exp(s*z_c) - s*z_label   softmax over competing classes, mean over the GLOBAL batch
                                 (classification.py); the own class's score less a margin (margins.py)
    total = nll + lambda * regulariser;   the regulariser classifies every proxy against the class sums of all proxies

Matryoshka: nll is the mean of those of the embedding and of its first d coordinates, brought to unit length, against
the first d coordinates of the same proxies, so that embeddings may be cut at these d. Declined: a bank for each d.

ProxyGML is top-k with the sum as the score: reverse label propagation and masked softmax. All proxies with a margin are
CosFace and ArcFace; a drawn share of the classes is PartialFC.

Each rank owns whole classes, so z is local and only vectors of length B cross ranks. There are two routes to the same
numbers: gather the embeddings and, for top-k, agree on the selection by exchanging "candidates" or by a "histogram"; or
"gather" the bank and process the rank's own images. Neither S [B, P] nor the logits [B, C] are ever materialised.
Declined: gathering the logits (B x C on every rank), a one-hot [P, C] matrix for the class sums (a class's N proxies
are adjacent).

Source: Zhu et al., "Fewer is More: A Deep Graph Metric Learning Perspective Using Fewer Proxies", NeurIPS 2020 (arXiv
2010.13636); An et al., "Killing Two Birds with One Stone: Efficient and Robust Training of Face Recognition CNNs by
Partial FC", CVPR 2022 (arXiv 2203.15565); Kusupati et al., "Matryoshka Representation Learning", NeurIPS 2022 (arXiv
2205.13147), of which this is the variant that shares its weights (MRL-E).

Dimension key: R rows (images) at hand, b/B images of this rank / over the group, c/C classes, p/P proxies, N proxies
per class, D embedding, s classes of this rank that compete; lower case is this rank's slice.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dist_proxygml.distributed.collectives import (
    AgreedError,
    NonFiniteError,
    all_reduce_sum,
    gather_objects,
    gather_rows,
    gather_to_rank_zero,
    group_named,
    rank_in,
    scatter_from_rank_zero,
    world_size_of,
)
from dist_proxygml.distributed.row_tensors import as_row_tensor, own_rows
from dist_proxygml.head.bank import NORM_FLOOR, FusedSearches
from dist_proxygml.head.choices import Head
from dist_proxygml.head.classification import (
    KeptMatrix,
    KeptPairs,
    Scoring,
    Settings,
    Subgraph,
    negative_log_likelihood,
)
from dist_proxygml.head.global_loss import OPTIMIZER_PREFIX, GlobalLoss
from dist_proxygml.head.margins import LengthStatistics
from dist_proxygml.head.partition import ClassPartition
from dist_proxygml.head.proxies import initial_proxies
from dist_proxygml.head.reference import LossTerms
from dist_proxygml.head.regularizer import (
    draw_anchors,
    proxy_regularizer,
    regularizer_anchors,
    sampled_proxy_regularizer,
)
from dist_proxygml.head.sampling import competing_classes, draw_classes, proxies_of
from dist_proxygml.head.selection import num_kept_proxies
from dist_proxygml.head.similarity import default_memory_budget
from dist_proxygml.head.traffic import cheapest_selection
from dist_proxygml.rules import (
    check_classes,
    check_margin,
    check_matryoshka,
    check_ratio_or_topk,
    check_search,
    check_sparse_gradient,
)

# How far from 1 the length of a unit row may be: rounding to bfloat16 changes it by up to 0.4 %.
_UNIT_TOLERANCE = 0.01


class ProxyLoss(GlobalLoss):
    """A classification loss on a partitioned proxy bank, and this rank's proxies.

    Without a group it behaves like any other loss: call it with embeddings and labels, call backward, step an
    optimizer on its parameters. With a group, call it on all ranks, each with its own images; it returns the loss of
    the global batch.

    On several ranks `state_dict()` holds the proxies as a DTensor over classes, which torch.distributed.checkpoint
    saves and loads on any number of ranks; `full_state_dict()` gathers them, and an optimizer's state, for torch.save.

    Gradients: those of `proxies` are complete on their rank and must not be reduced or averaged over ranks, so keep
    this module outside DistributedDataParallel or a DeepSpeed engine. Those of the embeddings depend on
    `gradient_reduction`.

    Args:
        num_classes: C, over all ranks.
        embedding_dim: D.
        head: which proxies compete, how they make a class's score, margin and scale. Default: ProxyGML.
        proxies_per_class: N.
        regularization_weight: lambda, weight of the proxy regulariser.
        regularization_anchors: number of proxies drawn in each forward pass to estimate the regulariser. Default: all,
            where the class sums fit the memory budget; otherwise as many as the global batch has images.
        group: ranks over which the classes are partitioned: a process group, or "world", the default one, which must
            have been initialised; None for this process alone.
        normalize: divide every embedding by its length, in the precision of the proxies; one of length 0 stays 0 and
            gets no gradient. False: the embeddings are unit rows already, which the first call checks.
        gradient_reduction: how the data-parallel engine reduces the backbone's gradients over ranks: "mean" (DeepSpeed,
            DDP) or "sum". With "mean" the embeddings' gradient is multiplied by the number of ranks, which the engine
            divides out again.
        selection: how ranks find the top-k: "gather" the bank, exchange "candidates", sum a "histogram", or "auto":
            whichever moves the fewest bytes for the given batch.
        memory_budget: bytes for similarities during the search; each kept pair takes about 120 bytes in addition. None:
            2 GiB on GPUs, 256 MiB elsewhere and for the regulariser, which is the same on every device.
        matmul_dtype: torch.bfloat16 rounds the inputs of the similarity product; its result, the softmax and all
            gradients keep the precision of the proxies.
        fused: on an NVIDIA GPU, in float32: use kernels (fused.py, needs triton) instead of torch's operators for the
            gradients and, where k is at most 1/32 of a rank's proxies, for a search that never stores the similarities.
            Top-k only.
        matryoshka_dims: also classify by the first d coordinates, for each of these d; ascending, below D.
        sparse: make `proxies.grad` a sparse COO tensor over classes, as torch.nn.Embedding(sparse=True) does, holding
            only classes with a competing proxy. Not where all compete, nor with a regulariser, whose gradients touch
            every proxy.
        initialization: "published", uniform in +-1/sqrt(C*N), or "unit", random unit vectors.
        seed: seeds the initial proxies, which do not depend on the number of ranks, the anchors and the sampled
            classes.

    Raises:
        ValueError: k <= N (no negative would be kept: loss and gradients would be 0), k > C*N, or a setting out of
            range.
    """

    is_partitioned: ClassVar[bool] = True
    """Ranks hold different parameters, so this module must not go into an engine that synchronises them."""
    proxies: nn.Parameter
    """[c, N, D], unnormalised: the proxies of this rank's classes."""
    partition: ClassPartition
    searches: FusedSearches
    """How often the kernels searched with `fused`, and how often in vain."""
    observer: Callable[[KeptPairs | KeptMatrix], None] | None
    """Called with the kept pairs of each forward pass of a top-k head, on every rank; must not change them. A
    `KeptMatrix` has the same `negatives`, `positives` and `partition`.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        head: Head = Head(),  # noqa: B008
        *,
        proxies_per_class: int = 1,
        regularization_weight: float = 0.0,
        regularization_anchors: int | None = None,
        group: dist.ProcessGroup | Literal["world"] | None = None,
        normalize: bool = True,
        gradient_reduction: Literal["mean", "sum"] = "mean",
        selection: Literal["auto", "gather", "candidates", "histogram"] = "auto",
        memory_budget: int | None = None,
        matmul_dtype: torch.dtype = torch.float32,
        fused: bool = False,
        matryoshka_dims: Sequence[int] = (),
        sparse: bool = False,
        initialization: Literal["published", "unit"] = "published",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if embedding_dim < 1 or proxies_per_class < 1:
            raise ValueError(
                f"embedding_dim and proxies_per_class must be at least 1, got {embedding_dim} and {proxies_per_class}"
            )
        if gradient_reduction not in ("mean", "sum"):
            raise ValueError(f'gradient_reduction must be "mean" or "sum", got {gradient_reduction!r}')
        if selection not in ("auto", "gather", "candidates", "histogram"):
            raise ValueError(f'selection must be "auto", "gather", "candidates" or "histogram", got {selection!r}')
        if matmul_dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"matmul_dtype must be torch.float32 or torch.bfloat16, got {matmul_dtype}")
        if memory_budget is not None and not memory_budget > 0:
            raise ValueError(f"memory_budget must be above 0 bytes, got {memory_budget}")
        margin = None if head.margin is None else head.margin.name
        check_margin(margin, class_score=head.class_score, proxies_per_class=proxies_per_class)
        check_search(head.negatives, selection=selection, fused=fused)
        check_classes(num_classes, share=head.share)
        check_matryoshka(matryoshka_dims, embedding_dim=embedding_dim, setting="matryoshka_dims")
        if head.margin is not None and head.margin.needs_lengths and not normalize:
            raise ValueError(
                f"expected normalize=True with a margin {head.margin.name!r}, which goes by the embeddings' lengths, "
                "got False; pass embeddings that are not normalised"
            )
        if sparse:
            check_sparse_gradient(
                negatives=head.negatives,
                selection=selection,
                regularization_weight=regularization_weight,
                wanted_by="sparse=True",
                instead="use sparse=False",
            )
        if not regularization_weight >= 0 or (regularization_anchors is not None and regularization_anchors < 1):
            raise ValueError(
                "regularization_weight must be at least 0 and regularization_anchors at least 1, got "
                f"{regularization_weight} and {regularization_anchors}"
            )
        group = group_named(group)
        self.partition = ClassPartition(num_classes, world_size_of(group), rank_in(group))
        self.num_classes, self.embedding_dim = num_classes, embedding_dim
        self.proxies_per_class = proxies_per_class
        self.head = head
        self.topk = None
        if head.negatives == "topk":
            self.topk = checked_topk(num_classes, proxies_per_class, ratio=head.ratio, topk=head.topk)
        self.regularization_weight = regularization_weight
        self.regularization_anchors = regularization_anchors
        self.group = group
        self.normalize = normalize
        self.gradient_reduction = gradient_reduction
        self.selection = selection
        self.memory_budget = memory_budget
        self.matmul_dtype = matmul_dtype
        self.fused = fused
        self.searches = FusedSearches()
        self.matryoshka_dims = tuple(matryoshka_dims)
        self.sparse = sparse
        self.seed = seed
        self.draw = 0
        self.observer = None
        self._lengths_are_checked = normalize
        self.proxies = nn.Parameter(
            initial_proxies(self.partition, proxies_per_class, embedding_dim, seed=seed, initialization=initialization)
        )
        self.log_scale = nn.Parameter(torch.tensor(math.log(head.scale))) if head.learn_scale else None
        needs_lengths = head.margin is not None and head.margin.needs_lengths
        self.length_statistics = LengthStatistics() if needs_lengths else None

    def forward(self, embeddings: Tensor, labels: Tensor) -> LossTerms:
        """Compute the loss of the global batch. Called on all ranks, each with any number of images, even none.

        Args:
            embeddings: [b, D] rows of any length, or unit rows with `normalize=False`; of the proxies' precision, or
                float16 or bfloat16, which is converted to it.
            labels: [b] int64 global class ids.

        Raises:
            ValueError: wrong shape or type, a non-finite embedding (its rank and row are named), a label out of range,
                a non-finite loss; the same error on every rank.
        """
        row_counts = self.agree_on_rows(embeddings, labels)
        with torch.autocast(embeddings.device.type, enabled=False):
            quality_B = self._quality(embeddings, row_counts)
            embeddings = self._unit_rows(embeddings)
            classification, kept_classes = self._classification(embeddings, labels, quality_B, row_counts)
            if self.regularization_weight > 0:
                regularization = self._regularization(sum(row_counts))
                total = classification + self.regularization_weight * regularization
            else:
                total, regularization = classification, classification.new_zeros(())
        value = total.item()  # the same number on every rank, so they raise together
        if not math.isfinite(value):
            raise NonFiniteError(
                f"expected a finite loss, got {value}; the embeddings are finite, so a proxy is NaN or infinite "
                "(lower the learning rate of the proxies), or the embeddings are too long (look at the backbone)"
            )
        self.draw += 1
        return LossTerms(total, classification.detach(), regularization.detach(), kept_classes)

    def selection_for(self, batch_size: int) -> str:
        """Return the selection used for a global batch of this size: "gather", "candidates" or "histogram"; "none"
        where not the top-k competes.
        """
        if self.topk is None:
            return "none"
        if self.selection != "auto":
            return self.selection
        return cheapest_selection(
            batch_size=batch_size,
            num_classes=self.partition.num_classes,
            proxies_per_class=self.proxies_per_class,
            embedding_dim=self.proxies.shape[2],
            topk=self.topk,
            world_size=self.partition.world_size,
            may_gather=not self.sparse,
        )

    def full_state_dict(self, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Tensor]:
        """Gather the proxies of all classes, on the CPU of rank 0; other ranks get {}. Called on all ranks.

        The layout is that of one process, so what was saved on any number of ranks loads on any other, by
        `load_full_state_dict`, and in one process by `load_state_dict`, too. Beyond the result, rank 0's device holds
        one other rank's proxies at a time.

        Args:
            optimizer: also gather its state of the proxies, named "optimizer.exp_avg" and so on. Learning rates and
                what it holds of other parameters are left out.
        """
        whole = {}
        for name, value in self.stored_tensors(optimizer).items():
            if value.ndim:
                whole[name] = gather_to_rank_zero(value, row_counts=self.partition.counts(), group=self.group)
            else:  # a scalar, the same on every rank
                whole[name] = value.detach().cpu().clone()
        return {name: value for name, value in whole.items() if value is not None} if self.partition.rank == 0 else {}

    def load_full_state_dict(self, state: Mapping[str, Tensor], optimizer: torch.optim.Optimizer | None = None) -> None:
        """Load what `full_state_dict` returned, on any number of ranks. Called on all ranks.

        Args:
            state: on rank 0 all of it (torch.load(path, mmap=True) reads it part by part); ignored on other ranks.
            optimizer: also replace its state of the proxies.

        Raises:
            ValueError: on every rank; there are no proxies, or those of other numbers of classes, proxies per class or
                dimensions, or what a loss with another head has, or no state of the optimizer.
        """
        num_classes, rank = self.partition.num_classes, self.partition.rank
        shape = (num_classes, *self.proxies.shape[1:])
        is_all = optimizer is not None
        wanted = {name: v for name, v in state.items() if is_all or not name.startswith(OPTIMIZER_PREFIX)}
        missing = [name for name in self.stored_tensors() if name not in wanted]
        strange = sorted(name for name in wanted if self.owner_of(name) is None)
        problem, kinds = None, {name: (tuple(v.shape), v.dtype) for name, v in wanted.items()}
        if missing:
            problem = (
                f"expected {', '.join(map(repr, missing))} in the state of rank 0, got {sorted(state) or 'nothing'}"
            )
        elif strange:
            problem = f"expected {', '.join(map(repr, self.stored_tensors()))} alone in the state of rank 0, got "
            problem += f"{', '.join(map(repr, strange))} too; build the loss with the head that was saved"
        elif (found := kinds["proxies"][0]) != shape:
            problem = f"expected proxies {list(shape)} (classes, per class, dimension) in the state, got {list(found)}"
            problem += f"; build the loss with num_classes={found[0]}" if found[1:] == shape[1:] else ""
        elif is_all and not any(name.startswith(OPTIMIZER_PREFIX) for name in wanted):
            problem = "expected an optimizer's state beside the proxies, got none; save full_state_dict(optimizer), or "
            problem += "load without the optimizer if it starts anew or keeps no state"
        problem, kinds = gather_objects((problem, kinds), group=self.group)[0]
        if problem is not None:
            raise AgreedError(problem)
        own: dict[str, Tensor] = {}
        for name, (size, dtype) in kinds.items():
            rows = self.partition.num_local if size else 0
            own[name] = torch.empty((rows, *size[1:]) if size else (), dtype=dtype, device=self.proxies.device)
            counts = self.partition.counts() if size else None
            scatter_from_rank_zero(wanted[name] if rank == 0 else None, own[name], row_counts=counts, group=self.group)
        self.restore(own, optimizer)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.partition.world_size > 1:
            name = prefix + "proxies"
            destination[name] = as_row_tensor(destination[name], self.partition.num_classes, self.group)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        name = prefix + "proxies"
        if name in state_dict:
            state_dict = {**state_dict, name: own_rows(state_dict[name])}
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        """Return the settings, for print(loss)."""
        return (
            f"{self.described}; proxies={tuple(self.proxies.shape)}, regularization_weight={self.regularization_weight}"
        )

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the proxies."""
        return self.proxies.dtype

    @property
    def device(self) -> torch.device:
        """Device of the proxies."""
        return self.proxies.device

    @property
    def described(self) -> str:
        """The method's name and what it is made of."""
        described = self.head.describe(self.partition.num_classes, self.proxies_per_class, self.topk)
        dims = ", ".join(map(str, self.matryoshka_dims))
        return f"{described}, also by the first {dims} dimensions" if dims else described

    @property
    def scale(self) -> float:
        """The softmax scale s."""
        return self.head.scale if self.log_scale is None else float(self.log_scale.detach().exp())

    def _quality(self, embeddings_bD: Tensor, row_counts: list[int]) -> Tensor | None:
        """q [B] of an adaface margin, by the lengths of all ranks' embeddings."""
        if self.length_statistics is None or self.head.margin is None:
            return None
        length_b = torch.linalg.vector_norm(embeddings_bD.detach().to(self.proxies.dtype), dim=1)
        length_B = gather_rows(length_b, row_counts=row_counts, group=self.group)
        quality_B: Tensor = self.length_statistics(length_B, self.head.margin.concentration)
        return quality_B

    def _unit_rows(self, embeddings_bD: Tensor) -> Tensor:
        """Bring the embeddings to the precision of the proxies and to length 1, or check once that they have it."""
        embeddings_bD = embeddings_bD.to(self.proxies.dtype)
        if not self.normalize and (self._lengths_are_checked or not len(embeddings_bD)):
            return embeddings_bD
        if self.normalize:
            return _UnitRows.apply(embeddings_bD)
        length_b1 = torch.linalg.vector_norm(embeddings_bD, dim=1, keepdim=True)
        self._lengths_are_checked = True
        num_others = int(((length_b1 - 1).abs() > _UNIT_TOLERANCE).sum())
        if num_others:
            warnings.warn(
                f"expected unit embeddings with normalize=False, got {num_others} of {len(length_b1)} rows of other "
                f"lengths (up to {float(length_b1.max()):.3g}): similarities are not cosines then; use normalize=True",
                stacklevel=4,
            )
        return embeddings_bD

    def _classification(
        self, embeddings_bD: Tensor, labels_b: Tensor, quality_B: Tensor | None, row_counts: list[int]
    ) -> tuple[Tensor, Tensor]:
        """Mean loss and mean number of competing classes per image of the global batch."""
        num_rows, rank = sum(row_counts), self.partition.rank
        if self.gradient_reduction == "mean" and self.group is not None:
            embeddings_bD = _ScaleGradient.apply(embeddings_bD, self.partition.world_size)
        selection = self.selection_for(num_rows)
        gathers_bank = selection == "gather"
        if gathers_bank:  # own images against all proxies
            embeddings_RD, labels_R = embeddings_bD, labels_b
            quality_R = None if quality_B is None else quality_B.split(row_counts)[rank]
            row_counts = [len(labels_b)]
            proxies_cND = gather_rows(self.proxies, row_counts=self.partition.counts(), group=self.group)
            partition, group = ClassPartition(self.partition.num_classes), None
        else:  # all images against own proxies
            embeddings_RD = gather_rows(embeddings_bD, row_counts=row_counts, group=self.group)
            labels_R, quality_R = gather_rows(labels_b, row_counts=row_counts, group=self.group), quality_B
            proxies_cND, partition, group = self.proxies, self.partition, self.group
        own_class_R = labels_R - partition.start
        subgraph = None
        if self.topk is not None:
            subgraph = Subgraph(
                num_negatives=self.topk - self.proxies_per_class,
                exchange="histogram" if selection == "histogram" else "candidates",
                partition=partition,
                row_counts=row_counts,
                fused=self.fused,
                searches=self.searches,
                sparse=self.sparse,
                observer=self.observer,
            )
        elif self.head.share is not None:
            is_drawn_c = draw_classes(partition, self.head.share, seed=self.seed, draw=self.draw)
            class_s, own_class_R = competing_classes(torch.from_numpy(is_drawn_c).to(labels_R.device), own_class_R)
            proxies_cND = proxies_of(proxies_cND, class_s, sparse=self.sparse)
        scale = torch.tensor(self.head.scale, dtype=embeddings_RD.dtype)  # of the host, an argument of every kernel
        if self.log_scale is not None:
            scale = _SumGradient.apply(self.log_scale.exp(), self.group)
        settings = Settings(
            scoring=Scoring(self.head.class_score, self.head.gamma, self.head.margin),
            group=group,
            memory_budget=self.memory_budget or default_memory_budget(self.device.type),
            matmul_dtype=self.matmul_dtype,
            subgraph=subgraph,
        )
        nll_R, competing_R = negative_log_likelihood(
            embeddings_RD, proxies_cND, scale, own_class_R, quality_R, settings
        )
        if self.matryoshka_dims:
            unseen = settings._replace(subgraph=None if subgraph is None else subgraph._replace(observer=None))
            for dim in self.matryoshka_dims:
                prefixes = (_UnitRows.apply(embeddings_RD[:, :dim]), _Prefix.apply(proxies_cND, dim, self.fused))
                nll_R = nll_R + negative_log_likelihood(*prefixes, scale, own_class_R, quality_R, unseen)[0]
            nll_R = nll_R / (1 + len(self.matryoshka_dims))
        sums_2 = torch.stack([nll_R, competing_R]).sum(dim=1)
        if gathers_bank:  # the rows were this rank's own
            sums_2 = all_reduce_sum(sums_2, group=self.group)
        classification, competing = (sums_2 / num_rows).unbind()
        return classification, competing.detach()

    def _regularization(self, batch_size: int) -> Tensor:
        """Mean cross entropy of all proxies, or an estimate of it from the next draw of anchors."""
        num_classes, num_per_class, dim = self.partition.num_classes, *self.proxies.shape[1:]
        memory_budget = self.memory_budget or default_memory_budget("cpu")  # or it would be another on every device
        num_anchors = regularizer_anchors(
            num_classes,
            dim,
            proxies_per_class=num_per_class,
            wanted=self.regularization_anchors,
            memory_budget=memory_budget,
            batch_size=batch_size,
        )
        if num_anchors is None:
            return proxy_regularizer(
                self.proxies, partition=self.partition, group=self.group, memory_budget=memory_budget
            )
        anchors_A = draw_anchors(num_classes * num_per_class, num_anchors, seed=self.seed, draw=self.draw)
        return sampled_proxy_regularizer(
            self.proxies,
            anchors_A,
            partition=self.partition,
            group=self.group,
            memory_budget=memory_budget,
        )

    def _misshapen(self, embeddings: Tensor, labels: Tensor) -> str | None:
        problem = super()._misshapen(embeddings, labels)
        if problem is None and self.fused and self.dtype != torch.float32:
            where = f"on rank {self.partition.rank}"
            return f"expected float32 proxies with fused=True, got {self.dtype} {where}; use fused=False"
        return problem


class ProxyGMLLoss(ProxyLoss):
    """The ProxyGML loss and this rank's proxies: `ProxyLoss` whose head is top-k and sum.

    Args:
        num_classes: C, over all ranks.
        embedding_dim: D.
        proxies_per_class: N.
        ratio: r in (0, 1]; k = ceil(r*C*N) proxies are kept per image. Default 0.05, unless `topk` is given.
        topk: k itself, instead of `ratio`.
        regularization_weight: lambda, weight of the proxy regulariser.
        scale: softmax scale s of the classification term; 1 in every published run.
        group: ranks over which the classes are partitioned: a process group, or "world"; None for this process alone.
        regularization_anchors, normalize, gradient_reduction, selection, memory_budget, matmul_dtype, fused, sparse,
            initialization, seed: as of `ProxyLoss`.

    Raises:
        ValueError: as `ProxyLoss`.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        *,
        proxies_per_class: int = 1,
        ratio: float | None = None,
        topk: int | None = None,
        regularization_weight: float = 0.0,
        regularization_anchors: int | None = None,
        scale: float = 1.0,
        group: dist.ProcessGroup | Literal["world"] | None = None,
        normalize: bool = True,
        gradient_reduction: Literal["mean", "sum"] = "mean",
        selection: Literal["auto", "gather", "candidates", "histogram"] = "auto",
        memory_budget: int | None = None,
        matmul_dtype: torch.dtype = torch.float32,
        fused: bool = False,
        sparse: bool = False,
        initialization: Literal["published", "unit"] = "published",
        seed: int = 0,
    ) -> None:
        super().__init__(
            num_classes,
            embedding_dim,
            Head(ratio=ratio, topk=topk, scale=scale),
            proxies_per_class=proxies_per_class,
            regularization_weight=regularization_weight,
            regularization_anchors=regularization_anchors,
            group=group,
            normalize=normalize,
            gradient_reduction=gradient_reduction,
            selection=selection,
            memory_budget=memory_budget,
            matmul_dtype=matmul_dtype,
            fused=fused,
            sparse=sparse,
            initialization=initialization,
            seed=seed,
        )


def checked_topk(
    num_classes: int, proxies_per_class: int, *, ratio: float | None, topk: int | None, section: str = ""
) -> int:
    """k, from `topk` or `ratio` (default ratio 0.05), with N < k <= C*N; `section` precedes their names in errors.

    Raises:
        ValueError: both are given, a value is out of range, or k <= N.
    """
    check_ratio_or_topk(ratio, topk, section=section, at_least=0)
    if topk is None:
        ratio = 0.05 if ratio is None else ratio
        if not 0 < ratio <= 1:
            raise ValueError(f"expected {section}ratio above 0 and at most 1, got {ratio}; change it")
        topk = min(num_kept_proxies(num_classes, proxies_per_class, ratio), num_classes * proxies_per_class)
    num_proxies = num_classes * proxies_per_class
    if not proxies_per_class < topk <= num_proxies:
        remedy = f"lower {section}topk to at most {num_proxies}"
        if topk <= proxies_per_class:
            at_least = f"topk to at least {proxies_per_class + 1}"
            remedy = f"raise {section}{at_least if ratio is None else 'ratio'}"
        raise ValueError(
            f"expected more than {proxies_per_class} (proxies per class) and at most {num_proxies} kept proxies per "
            f"image, got k = {topk}: an image always keeps its own {proxies_per_class} proxies, and without a negative "
            f"every loss and gradient is 0; {remedy}"
        )
    if topk <= 2 * proxies_per_class:
        warnings.warn(
            f"k = {topk} keeps at most as many negatives as positives ({proxies_per_class} per class); published "
            "results fall off there, consider a larger ratio",
            stacklevel=3,
        )
    return topk


class _UnitRows(torch.autograd.Function):
    """Divide rows by their lengths; one of length 0 stays 0, without a gradient, which division by infinity brings.

    d u / d x = (1 - u u^T) / |x|, in four kernels where autograd launches twelve.
    """

    @staticmethod
    def forward(ctx, rows_bD):  # type: ignore[no-untyped-def]
        length_b1 = torch.linalg.vector_norm(rows_bD, dim=1, keepdim=True)
        length_b1.add_(length_b1, alpha=0)  # infinity becomes NaN: it times 0 is
        length_b1 = F.threshold(length_b1, NORM_FLOOR, math.inf)
        unit_bD = rows_bD / length_b1
        ctx.save_for_backward(unit_bD, length_b1)
        return unit_bD

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient_bD):  # type: ignore[no-untyped-def]
        unit_bD, length_b1 = ctx.saved_tensors
        radial_b = torch.linalg.vecdot(gradient_bD, unit_bD)
        return gradient_bD.addcmul(unit_bD, radial_b[:, None], value=-1).div_(length_b1)


class _Prefix(torch.autograd.Function):
    """The first coordinates of the proxies, where kernels read them as a copy; unlike slicing, its gradient may be
    sparse.
    """

    @staticmethod
    def forward(ctx, proxies_cND, dim, is_copied):  # type: ignore[no-untyped-def]
        ctx.shape = proxies_cND.shape
        prefix_cNd = proxies_cND[..., :dim]
        return prefix_cNd.contiguous() if is_copied else prefix_cNd

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        rest = (0, ctx.shape[-1] - gradient.shape[-1])
        if not gradient.is_sparse:
            return F.pad(gradient, rest), None, None
        gradient = gradient.coalesce()
        values = F.pad(gradient.values(), rest)
        return (
            torch.sparse_coo_tensor(gradient.indices(), values, ctx.shape, is_coalesced=True, check_invariants=False),
            None,
            None,
        )


class _ScaleGradient(torch.autograd.Function):
    """Identity in forward; multiply the gradient by a factor in backward.

    Why W: the loss L is already the mean over the global batch, and its gradient with respect to the backbone's weights
    is the SUM over ranks of what each rank back-propagates. DeepSpeed and DDP take the mean, (1/W) * sum, so each rank
    back-propagates W times its part.
    """

    @staticmethod
    def forward(ctx, value, factor):  # type: ignore[no-untyped-def]
        ctx.factor = factor
        return value.view_as(value)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        return gradient * ctx.factor, None


class _SumGradient(torch.autograd.Function):
    """Identity in forward; sum the gradient over ranks in backward."""

    @staticmethod
    def forward(ctx, value, group):  # type: ignore[no-untyped-def]
        ctx.group = group
        return value.view_as(value)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        return all_reduce_sum(gradient, group=ctx.group), None
