"""What losses of the global batch have in common: ranks agree on its rows, and a run resumes from its state."""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_proxygml.distributed.collectives import (
    AgreedError,
    NonFiniteError,
    gather_objects,
    gather_rows,
    rank_in,
    world_size_of,
)
from dist_proxygml.head.partition import ClassPartition

OPTIMIZER_PREFIX = "optimizer."


class GlobalLoss(nn.Module):
    """A loss of the images of all ranks, which every rank calls with its own."""

    partition: ClassPartition | None
    """Of the rows that `stored_tensors` returns; None: every rank has all of every tensor."""
    topk: int | None
    """k; None where not the top-k competes."""
    log_scale: nn.Parameter | None
    """The logarithm of a learned scale, a scalar; the same on every rank, as is its gradient."""
    group: dist.ProcessGroup | None
    """The ranks; None for one, also where a group of one was given."""
    num_classes: int
    embedding_dim: int
    draw: int
    """Index of the next forward pass, by which it draws; each increments it. A resumed run sets it."""

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the computation."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Device of the computation."""
        raise NotImplementedError

    @property
    def described(self) -> str:
        """The method's name and what it is made of."""
        raise NotImplementedError

    def stored_tensors(self, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Tensor]:
        """Return this rank's tensors that a resumed run needs. With a partition: rows [c, ...], and scalars, the same
        on every rank; without: all of each, the same on every rank.

        Their order does not depend on the run's history, so that equal states give equal files. Not copied.
        """
        parameters = dict(self.named_parameters())
        tensors = {name: value.detach() for name, value in [*parameters.items(), *self.named_buffers()]}
        states: Mapping[Any, dict[str, Tensor]] = {} if optimizer is None else optimizer.state
        for name, parameter in parameters.items():
            prefix = OPTIMIZER_PREFIX + ("" if name == "proxies" else f"{name}.")
            tensors |= {prefix + key: value for key, value in sorted(states.get(parameter, {}).items())}
        return tensors

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], optimizer: torch.optim.Optimizer | None = None) -> None:
        """Take over what `stored_tensors` returned; `optimizer` gets the state that is among it, without a copy."""
        parameters = dict(self.named_parameters())
        own = self.stored_tensors()
        states: dict[str, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name in own:
                own[name].copy_(value)
            else:
                owner, key = self.owner_of(name) or name, name.rpartition(".")[2]
                states.setdefault(owner, {})[key] = value if value.ndim else value.cpu()
        if optimizer is not None:
            order = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
            before = optimizer.state_dict()
            loaded = {order.index(id(parameters[name])): state for name, state in states.items()}
            optimizer.load_state_dict(before | {"state": before["state"] | loaded})

    def owner_of(self, name: str) -> str | None:
        """Return the parameter or buffer that a stored tensor is, or that it is the optimizer's state of; None where
        this loss has none such.
        """
        own = dict([*self.named_parameters(), *self.named_buffers()])
        owner = name
        if name.startswith(OPTIMIZER_PREFIX):
            owner = name.removeprefix(OPTIMIZER_PREFIX).rpartition(".")[0] or "proxies"
        return owner if owner in own else None

    def agree_on_rows(self, embeddings: Tensor, labels: Tensor) -> list[int]:
        """Return the number of rows on every rank, once every rank's batch has been validated."""
        valid = self._are_valid(embeddings, labels)
        num_rows = labels.shape[0] if labels.ndim else 0
        if self.group is None and num_rows and bool(valid):
            return [num_rows]
        own_12 = torch.stack([valid.new_full((), num_rows, dtype=torch.int64), valid.long()])[None]
        all_W2 = gather_rows(own_12, row_counts=[1] * world_size_of(self.group), group=self.group).tolist()
        if not all(valid for _, valid in all_W2):  # the same on every rank
            problems = gather_objects(self._problem_with(embeddings, labels), group=self.group)
            # Report wrong shapes and types before non-finite values.
            raise min((p for p in problems if p is not None), key=lambda problem: isinstance(problem, NonFiniteError))
        row_counts = [count for count, _ in all_W2]
        if sum(row_counts) == 0:
            raise AgreedError("expected at least one image in the global batch, got none on any rank")
        return row_counts

    def _are_valid(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Check this rank's batch; returns a bool on the device, so that ranks synchronise only once."""
        if self._misshapen(embeddings, labels) is not None:
            return torch.zeros((), dtype=torch.bool, device=self.device)
        in_range = (labels.clamp(0, self.num_classes - 1) == labels).all()
        if not embeddings.numel():
            return in_range
        return (torch.linalg.vector_norm(embeddings.detach(), math.inf) < math.inf) & in_range

    def _misshapen(self, embeddings: Tensor, labels: Tensor) -> str | None:
        where = f"on rank {rank_in(self.group)}"
        dim, dtype = self.embedding_dim, self.dtype
        if embeddings.ndim != 2 or embeddings.shape[1] != dim or labels.shape != embeddings.shape[:1]:
            shapes = f"{list(embeddings.shape)} and {list(labels.shape)}"
            return f"expected embeddings [b, {dim}] and labels [b], got {shapes} {where}"
        if dtype not in (torch.float32, torch.float64):
            return f"expected a loss in float32 or float64, got {dtype} {where}; bfloat16 products: matmul_dtype"
        if embeddings.dtype not in (dtype, torch.float16, torch.bfloat16) or labels.dtype != torch.int64:
            return (
                f"expected {dtype} embeddings (like the loss) or half precision, and torch.int64 labels, got "
                f"{embeddings.dtype} and {labels.dtype} {where}; convert them, or the loss with .to(dtype)"
            )
        return None

    def _problem_with(self, embeddings: Tensor, labels: Tensor) -> AgreedError | None:
        misshapen = self._misshapen(embeddings, labels)
        if misshapen is not None:
            return AgreedError(misshapen)
        if bool(self._are_valid(embeddings, labels)):
            return None
        where, num_classes = f"on rank {rank_in(self.group)}", self.num_classes
        finite_b = embeddings.detach().isfinite().all(dim=1)
        if not bool(finite_b.all()):
            rows = (~finite_b).nonzero().flatten().tolist()
            return NonFiniteError(
                f"expected finite embeddings, got NaN or infinity in row {rows[0]} {where} "
                f"({len(rows)} of {len(labels)} rows); lower the learning rate or look at that image"
            )
        row = int(((labels < 0) | (labels >= num_classes)).nonzero()[0])
        return AgreedError(
            f"expected labels from 0 to {num_classes - 1}, got {int(labels[row])} in row {row} {where}; "
            "num_classes does not fit the data"
        )
