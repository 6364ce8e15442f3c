"""Batch normalisation over the images of all ranks, in float32.

    y = (x - mean) / sqrt(var + eps) * weight + bias       mean and var per channel, over the micro-batch of ALL ranks

With per-rank statistics, as under DistributedDataParallel and DeepSpeed, every rank would train a different network
with different running statistics, and 8 ranks of 4 images would not normalise as one rank of 32. Here the outputs,
gradients and running statistics are the same for any number of ranks. Arithmetic is float32 even under a bf16 engine,
which casts weights but not running statistics.

torch.nn.SyncBatchNorm was declined: it does not run on CPUs, and does not mix bf16 weights with float32 statistics. On
GPUs the operators behind it compute, a kernel for each pass over the images. Each rank sends count, mean and sum of
squared deviations (joined by the parallel formula of Chan, Golub and LeVeque, 1983; those operators send 1 / standard
deviation), and in backward two sums per channel. Under gradient checkpointing a layer runs a second time in the
backward pass; the running statistics, which have the batch already, then stay as they are.

Dimension key: b images of this rank, C channels here, W ranks.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dist_proxygml.backbones.gradient_checkpointing import is_recomputation
from dist_proxygml.distributed.collectives import all_reduce_sum, gather_rows, world_size_of


class GlobalBatchNorm(_BatchNorm):
    """Replace a torch or timm BatchNorm layer, taking over its parameters and buffers.

    In training mode, called on all ranks of the group. timm's layers include an activation, which is kept.
    """

    def __init__(self, original: _BatchNorm, group: dist.ProcessGroup | None) -> None:
        super().__init__(original.num_features, original.eps, original.momentum, original.affine)
        self.weight, self.bias = original.weight, original.bias
        self.running_mean, self.running_var = original.running_mean, original.running_var
        self.num_batches_tracked = original.num_batches_tracked
        self.group = group
        self.is_compiled = world_size_of(group) == 1
        """Whether torch.compile may trace its training; collectives and recomputations are beyond it."""
        after = [
            getattr(original, name) for name in ("drop", "act") if isinstance(getattr(original, name, None), nn.Module)
        ]
        self.after = nn.Sequential(*after)
        self.train(original.training)

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised x [b, C, ...], in the dtype of x."""
        if self.training and not self.is_compiled:
            return self._normalise_eagerly(x)
        return self._normalise(x)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _normalise_eagerly(self, x: Tensor) -> Tensor:
        return self._normalise(x)

    def _normalise(self, x: Tensor) -> Tensor:
        assert self.running_mean is not None
        assert self.running_var is not None
        wide = torch.promote_types(x.dtype, torch.float32)  # float64 stays what it is
        wide_x, weight, bias = x.to(wide), self.weight.to(wide), self.bias.to(wide)
        mean_C, var_C = self.running_mean.to(wide), self.running_var.to(wide)  # the buffers themselves, unless cast
        if not self.training:
            y = F.batch_norm(wide_x, mean_C, var_C, weight, bias, False, 0.0, self.eps)
        else:
            assert self.num_batches_tracked is not None
            is_again = not torch.compiler.is_compiling() and is_recomputation()  # of a batch that the statistics have
            if is_again:
                mean_C, var_C = mean_C.clone(), var_C.clone()
            else:
                self.num_batches_tracked.add_(1)
            momentum = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            if world_size_of(self.group) == 1:
                y = F.batch_norm(wide_x, mean_C, var_C, weight, bias, True, momentum, self.eps)
            elif x.is_cuda:
                y = _NormalizeOverGpus.apply(wide_x, weight, bias, mean_C, var_C, momentum, self.eps, self.group)
            else:
                y, batch_mean_C, batch_var_C, count = _NormalizeOverRanks.apply(
                    wide_x, weight, bias, self.eps, self.group
                )
                with torch.no_grad():
                    mean_C.lerp_(batch_mean_C, momentum)
                    var_C.lerp_(batch_var_C * count / (count - 1), momentum)
            if mean_C is not self.running_mean and not is_again:
                self.running_mean.copy_(mean_C)
                self.running_var.copy_(var_C)
        return self.after(y.to(x.dtype))

    def _check_input_dim(self, input: Tensor) -> None:
        """Accept two or more dimensions."""


def convert_batch_norm(model: nn.Module, group: dist.ProcessGroup | None) -> None:
    """Replace every BatchNorm layer inside `model`, keeping names and values of parameters and buffers."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, _BatchNorm) and child.affine and child.track_running_stats:
                setattr(parent, name, GlobalBatchNorm(child, group))


class _NormalizeOverRanks(torch.autograd.Function):
    """Return normalised x, mean [C], biased variance [C], number of values per channel over all ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, group: dist.ProcessGroup) -> Any:
        """Normalise x. Called on all ranks; one all-gather."""
        count = x.numel() // x.shape[1]
        mean_C, var_C = torch.batch_norm_update_stats(x, None, None, 0.0)  # 20 times as fast as var_mean over NHWC maps
        own_1S = torch.cat([mean_C.new_tensor([count]), mean_C, var_C * count])[None]
        all_WS = gather_rows(own_1S, row_counts=[1] * world_size_of(group), group=group)
        count_W1, mean_WC, deviations_WC = all_WS.split([1, x.shape[1], x.shape[1]], dim=1)
        total = count_W1.sum()
        mean_C = (count_W1 * mean_WC).sum(dim=0) / total
        var_C = (deviations_WC + count_W1 * (mean_WC - mean_C).square()).sum(dim=0) / total
        y = F.batch_norm(x, mean_C, var_C, weight, bias, False, 0.0, eps)
        ctx.save_for_backward(x, weight, mean_C, (var_C + eps).rsqrt(), total)
        ctx.eps, ctx.group = eps, group
        ctx.mark_non_differentiable(mean_C, var_C, total)
        return y, mean_C, var_C, total

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> Any:
        """Called on all ranks; one all-reduce SUM. Weight and bias get this rank's part of their gradients."""
        x, weight, mean_C, inverse_std_C, total = ctx.saved_tensors
        _, d_weight_C, d_bias_C = torch.ops.aten.native_batch_norm_backward(
            dy, x, weight, None, None, mean_C, inverse_std_C, True, ctx.eps, [False, True, True]
        )
        sums_2C = all_reduce_sum(torch.stack([d_weight_C, d_bias_C]), group=ctx.group) / total
        # dx = weight / std * (dy - mean(dy) - xhat * mean(dy * xhat)) = slope * dy + curve * x + offset
        shape = [1, -1, *[1] * (x.ndim - 2)]
        slope_C = weight * inverse_std_C
        curve_C = -slope_C * inverse_std_C * sums_2C[0]
        offset_C = -slope_C * sums_2C[1] - curve_C * mean_C
        dx = torch.addcmul(offset_C.view(shape), x, curve_C.view(shape)).addcmul_(dy, slope_C.view(shape))
        return dx, d_weight_C, d_bias_C, None, None


class _NormalizeOverGpus(torch.autograd.Function):
    """Return normalised x, and update the running statistics, by the fused operators of torch.nn.SyncBatchNorm."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        running_mean_C: Tensor,
        running_var_C: Tensor,
        momentum: float,
        eps: float,
        group: dist.ProcessGroup,
    ) -> Tensor:
        """Normalise x. Called on all ranks; one all-gather."""
        x, num_channels = _dense(x), x.shape[1]
        own_mean_C, own_inverse_C = torch.batch_norm_stats(x, eps)
        count_1 = own_mean_C.new_full((1,), x.numel() // num_channels)
        own_1S = torch.cat([own_mean_C, own_inverse_C, count_1])[None]
        all_WS = gather_rows(own_1S, row_counts=[1] * world_size_of(group), group=group)
        mean_WC, inverse_WC, count_W1 = all_WS.split([num_channels, num_channels, 1], dim=1)
        count_W = count_W1.flatten()
        mean_C, inverse_C = torch.batch_norm_gather_stats_with_counts(
            x, mean_WC, inverse_WC, running_mean_C, running_var_C, momentum, eps, count_W
        )
        ctx.save_for_backward(x, weight, mean_C, inverse_C, count_W.int())
        ctx.group = group
        return torch.batch_norm_elemt(x, weight, bias, mean_C, inverse_C, eps)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        """Called on all ranks; one all-reduce SUM. Weight and bias get this rank's part of their gradients."""
        x, weight, mean_C, inverse_C, count_W = ctx.saved_tensors
        dy = _dense(dy)
        own_sum_C, own_product_C, d_weight_C, d_bias_C = torch.batch_norm_backward_reduce(
            dy, x, mean_C, inverse_C, weight, True, True, True
        )
        sum_C, product_C = all_reduce_sum(torch.stack([own_sum_C, own_product_C]), group=ctx.group).unbind()
        dx = torch.batch_norm_backward_elemt(dy, x, mean_C, inverse_C, weight, sum_C, product_C, count_W)
        return dx, d_weight_C, d_bias_C, None, None, None, None, None


def _dense(x: Tensor) -> Tensor:
    """Return x without gaps, in either order that the operators know: channels first or last."""
    is_last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return x if is_last else x.contiguous()
