"""Gradient checkpointing: activations of a network's blocks are computed again in the backward pass instead of kept.

Memory of activations falls to the inputs of the blocks and the inside of one of them, for about a third more time
(Chen, Xu, Zhang, Guestrin 2016, "Training Deep Nets with Sublinear Memory Cost"). Loss and gradients are the same:
random numbers are drawn again from the same state, and BatchNorm leaves its running statistics alone the second time
(batch_norm.py). On several ranks its sums over ranks are sent again; ranks run the same backward pass, so they stay in
step.

timm's networks know their blocks (`set_grad_checkpointing`). In others a block is an outermost module, with layers of
its own, that stands in an nn.Sequential or nn.ModuleList: Bottleneck of a ResNet, MBConv of an EfficientNet,
EncoderBlock of a vision transformer. A network without such blocks is refused.

Declined: choosing operations instead of blocks, offloading activations to the host.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Switch = Callable[[bool], object]
"""Switches checkpointing on or off."""


def is_recomputation() -> bool:
    """Whether this forward pass runs inside a backward pass."""
    return torch._C._current_graph_task_id() != -1


class BlockSwitch:
    """Switches the checkpointing of blocks, whose forward passes it replaces; names of parameters stay."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self.is_on = False
        for block in blocks:
            block.forward = _Forward(block.forward, self)

    def __call__(self, enable: bool) -> None:
        """Switch."""
        self.is_on = enable


class _Forward:
    """The forward pass of a block; an object, so that a copy of a network gets one of its own block."""

    def __init__(self, forward: Callable[..., Any], switch: BlockSwitch) -> None:
        self._forward, self._switch = forward, switch

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._switch.is_on:
            return checkpointed(self._forward, *args, **kwargs)
        return self._forward(*args, **kwargs)


def checkpointed(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function, without keeping its activations if gradients are wanted."""
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    return checkpoint(function, *args, use_reentrant=False, **kwargs)


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """Find a network's blocks; none if it has none."""
    return list(_blocks(model, is_in_chain=_is_chain(model)))


def _blocks(module: nn.Module, *, is_in_chain: bool) -> Iterator[nn.Module]:
    for child in module.children():
        if not any(True for _ in child.children()):
            continue  # a layer
        if _is_chain(child):
            inner = list(_blocks(child, is_in_chain=True))
            yield from inner or ([child] if is_in_chain else [])
        elif is_in_chain:
            yield child
        else:
            yield from _blocks(child, is_in_chain=False)


def _is_chain(module: nn.Module) -> bool:
    """Whether a module only holds others."""
    return isinstance(module, nn.ModuleList) or (
        isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward
    )


def saved_bytes(function: Callable[[], Tensor]) -> int:
    """Count the bytes that autograd keeps for the backward pass of a function, outside of checkpointed blocks."""
    total = 0

    def pack(value: Tensor) -> Tensor:
        nonlocal total
        total += value.numel() * value.element_size()
        return value

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        function()
    return total
