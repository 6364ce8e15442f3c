"""Optimizers and updates beyond torch.optim for proxy banks of millions of classes.

    RowwiseAdagrad          one number of state per proxy instead of Adam's two per element
    SparseAdam              the update of torch.optim.SparseAdam, without temporaries that grow with the gradient
    coalesced               a sparse gradient with one row a class
    squared_norm            of a gradient as large as the bank
    bring_to_unit_length_   proxies back to length 1 after an update

A gradient is either dense, [c, N, D] like the bank, or sparse: torch's COO layout over classes, with indices [1, u] of
the classes that an image kept and values [u, N, D]; then only those u classes are read or written. A learned scale, a
scalar, is updated by the same rules.
Both are processed in blocks of classes, so that no temporary is as large as the bank.

Row-wise Adagrad is that of Naumov et al., "Deep Learning Recommendation Model for Personalization and Recommendation
Systems" (arXiv 1906.00091) and Mudigere et al., "Software-Hardware Co-design for Fast and Scalable Training of Deep
Learning Recommendation Models" (arXiv 2104.05158). torch.optim.SparseAdam itself was declined: it takes half a dozen
temporaries of the size of the gradient, which is the bank's where images keep most classes, and twice the time. So was
an update fused into the backward pass, which rules out accumulation and clipping.

Dimension key: c classes of this rank, u classes with a gradient, x classes of a block, N proxies per class, D
embedding.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dist_proxygml.head.bank import NORM_FLOOR

# Elements of a block: on a CPU 1 MiB in float32, which stays in its cache with its copies; on a GPU 256 MiB, for few
# launches.
_NUMBERS_PER_BLOCK = 1 << 18
_NUMBERS_PER_BLOCK_ON_GPU = 1 << 26


class _RowOptimizer(torch.optim.Optimizer):
    """Optimizer whose update of a class depends on that class's rows only."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient. A closure is not supported."""
        assert closure is None
        for group in self.param_groups:
            for proxies in group["params"]:
                if proxies.grad is not None:
                    self._update(proxies, proxies.grad, group)

    @abstractmethod
    def _update(self, proxies_cND: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None: ...


class RowwiseAdagrad(_RowOptimizer):
    """Adagrad with one step size per proxy: p -= lr * g / (sqrt(sum over steps of mean(g^2)) + eps).

    The mean is over a proxy's D elements, so a step keeps the gradient's direction. Takes dense and sparse gradients
    and gives the same numbers for both: a proxy whose gradient is 0 does not move and keeps its state. No weight decay,
    which would have to move every proxy.

    Args:
        parameters: of shape [..., D]; a sparse gradient is sparse over the first dimension.
        lr: learning rate.
        eps: added to the root of the sum.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]], lr: float, *, eps: float = 1e-8
    ) -> None:
        super().__init__(parameters, {"lr": lr, "eps": eps})

    def _update(self, proxies_cND: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        state, lr, eps = self.state[proxies_cND], group["lr"], group["eps"]
        if not state:
            state["squared_gradient"] = proxies_cND.new_zeros(proxies_cND.shape[:-1])

        def update(gradient_xND: Tensor, proxies_xND: Tensor, squared_xN: Tensor) -> None:
            squared_xN += gradient_xND.square().mean(dim=-1)
            length_xN = squared_xN.sqrt().add_(eps)
            length = length_xN.unsqueeze(-1) if gradient_xND.ndim else length_xN
            proxies_xND.addcdiv_(gradient_xND, length, value=-lr)

        _update_in_blocks(update, gradient, [proxies_cND, state["squared_gradient"]])


class SparseAdam(_RowOptimizer):
    """Adam on the classes in a sparse gradient; other classes and their moments stay unchanged.

    m = b1*m + (1-b1)*g,  v = b2*v + (1-b2)*g^2,  p -= lr * sqrt(1-b2^t)/(1-b1^t) * m / (sqrt(v) + eps),  t = steps

    as in torch.optim.SparseAdam and in section 2 of Kingma and Ba (arXiv 1412.6980). Note what t and eps mean: t counts
    the optimizer's steps, not a class's, so a class that is first kept late moves (1-b1)/sqrt(1-b2) = 3 times lr with
    the default betas; and eps is added before the correction of v, so it weighs more in early steps than in
    torch.optim.Adam. No weight decay, which would have to move every proxy.

    Args:
        parameters: a sparse gradient is sparse over the first dimension; a dense one updates all classes.
        lr: learning rate.
        betas: decay rates b1 and b2 of the moments.
        eps: added to the root of the second moment.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps})

    def _update(self, proxies_cND: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2), eps = self.state[proxies_cND], group["betas"], group["eps"]
        if not state:
            state["step"] = torch.zeros(())  # on the CPU: reading it waits for no device
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(proxies_cND), torch.zeros_like(proxies_cND)
        state["step"] += 1
        step = state["step"].item()
        step_size = group["lr"] * math.sqrt(1 - beta2**step) / (1 - beta1**step)

        def update(gradient_xND: Tensor, proxies_xND: Tensor, mean_xND: Tensor, square_xND: Tensor) -> None:
            mean_xND.lerp_(gradient_xND, 1 - beta1)
            square_xND.mul_(beta2).addcmul_(gradient_xND, gradient_xND, value=1 - beta2)
            proxies_xND.addcdiv_(mean_xND, square_xND.sqrt().add_(eps), value=-step_size)

        _update_in_blocks(update, gradient, [proxies_cND, state["exp_avg"], state["exp_avg_sq"]])


def coalesced(gradient: Tensor) -> Tensor:
    """Return a sparse gradient with one row per class, in ascending order, like `Tensor.coalesce`, but without sorting
    and copying if it is coalesced already. The loss returns coalesced gradients, but autograd drops the flag.
    """
    if gradient.is_coalesced():
        return gradient
    indices_u = gradient._indices()[0]
    if bool((indices_u[1:] > indices_u[:-1]).all()):
        return gradient._coalesced_(True)
    return gradient.coalesce()


def squared_norm(values_uND: Tensor) -> Tensor:
    """Sum the squares of a dense tensor by way of its row lengths, as a float64 scalar.

    `square().sum()` needs a temporary as large as the bank; `vector_norm` of the whole adds in float32 and is 2 % short
    at 128 million elements on a CPU.
    """
    return torch.linalg.vector_norm(values_uND, dim=-1).double().square().sum()


@torch.no_grad()
def bring_to_unit_length_(proxies_cND: Tensor, *, classes_u: Tensor | None = None) -> None:
    """Normalise proxies in place: those of the classes `classes_u`, int64 without repetition, or all.

    A proxy of length 0 stays 0.
    """
    if classes_u is None:
        for block_xND in proxies_cND.split(_classes_per_block(proxies_cND)):
            block_xND /= _lengths(block_xND)
        return
    for classes_x in classes_u.split(_classes_per_block(proxies_cND)):
        block_xND = proxies_cND.index_select(0, classes_x)
        proxies_cND.index_copy_(0, classes_x, block_xND / _lengths(block_xND))


def _update_in_blocks(update: Callable[..., None], gradient: Tensor, tensors: Sequence[Tensor]) -> None:
    """Call `update(gradient, *tensors)`, which modifies the tensors in place, block by block of classes."""
    size = _classes_per_block(gradient)
    if not gradient.ndim:  # a learned scale
        update(gradient, *tensors)
        return
    if not gradient.is_sparse:
        for blocks in zip(gradient.split(size), *(tensor.split(size) for tensor in tensors), strict=True):
            update(*blocks)
        return
    gradient = coalesced(gradient)
    for classes_x, gradient_xND in zip(gradient.indices()[0].split(size), gradient.values().split(size), strict=True):
        blocks = tuple(tensor.index_select(0, classes_x) for tensor in tensors)
        update(gradient_xND, *blocks)
        for tensor, block in zip(tensors, blocks, strict=True):
            tensor.index_copy_(0, classes_x, block)


def _lengths(proxies_xND: Tensor) -> Tensor:
    return torch.linalg.vector_norm(proxies_xND, dim=-1, keepdim=True).clamp(min=NORM_FLOOR)


def _classes_per_block(tensor: Tensor) -> int:
    numbers = _NUMBERS_PER_BLOCK_ON_GPU if tensor.is_cuda else _NUMBERS_PER_BLOCK
    return max(1, numbers // max(1, math.prod(tensor.shape[1:])))
