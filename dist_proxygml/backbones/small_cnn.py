"""A small convolutional trunk for images of 32 to 64 pixels, trained in minutes on a CPU.

    stage s = 0, 1, ...:  3x3 convolution to width * 2^s channels with that stage's stride,
                          BatchNorm, ReLU, then that stage's number of residual blocks

Chosen: strided convolutions and no pooling inside. Small centred images lose too much to pooling
and global averaging; this trunk is meant for a pooled grid of 4x4 (`pool` of the configuration).
Declined: dropout and other regularisers, which are of no use in a few minutes of training.
"""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

_MOST = 1 << 16


class SmallCnn(nn.Sequential):
    """The stages one after the other: [b, 3, H, W] -> [b, width * 2^(stages - 1), h, w].

    `width` is the number of channels of the first stage, `strides` the stride of each stage, and
    `residual_blocks` how many residual blocks follow its first convolution.

    Raises:
        ValueError: the two lists differ in length, or a number has a wrong type, is too small or absurd.
    """

    def __init__(
        self,
        *,
        width: int = 24,
        strides: Sequence[int] = (1, 2, 2, 2),
        residual_blocks: Sequence[int] = (0, 0, 0, 0),
    ) -> None:
        _check_integers("width", [width], at_least=1)
        _check_integers("strides", strides, at_least=1)
        _check_integers("residual_blocks", residual_blocks, at_least=0)
        if len(strides) != len(residual_blocks):
            raise ValueError(
                f"strides {list(strides)} describe {len(strides)} stages but residual_blocks "
                f"{list(residual_blocks)} {len(residual_blocks)}; give both one entry per stage"
            )
        layers: list[nn.Module] = []
        num_channels = 3
        for stage, (stride, num_blocks) in enumerate(zip(strides, residual_blocks, strict=True)):
            num_outputs = width * 2**stage
            layers.append(_convolution(num_channels, num_outputs, stride=stride))
            layers.extend(ResidualBlock(num_outputs) for _ in range(num_blocks))
            num_channels = num_outputs
        super().__init__(*layers)


class ResidualBlock(nn.Module):
    """x -> relu(x + two convolutions of x), at constant size."""

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.first = _convolution(num_channels, num_channels)
        self.second = _convolution(num_channels, num_channels, activation=False)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Return the block's output, of the input's shape."""
        return F.relu(x + self.second(self.first(x)))


def _convolution(inputs: int, outputs: int, *, stride: int = 1, activation: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = [
        nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    if activation:
        layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


def _check_integers(name: str, values: Any, *, at_least: int) -> None:
    fits = isinstance(values, Sequence) and len(values) > 0
    if not fits or any(type(value) is not int or not at_least <= value <= _MOST for value in values):
        raise ValueError(f"{name} of small_cnn must be made of integers from {at_least} to {_MOST}, got {values!r}")
