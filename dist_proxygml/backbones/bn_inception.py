"""BN-Inception (Inception with batch normalisation), the backbone of the published results.

    BGR images [b, 3, H, W], 0-255, mean subtracted  ->  feature map [b, 1024, H/32, W/32]

Source of the architecture: Ioffe and Szegedy 2015, "Batch Normalization", appendix. Channel counts,
biases of the convolutions, max pools that round up, and names are those of the weight file that the
metric learning literature starts from (`bn_inception-52deb4733.pth`), so that it loads by strict
names once its `last_linear` (1000 ImageNet classes) is dropped.

Chosen: one table of channels and one forward function for all ten blocks; layers are registered
under the flat names of the weight file. Declined: a nested module per block, which reads a little
better and then needs a key map. The running statistics move by 0.1 a step, torch's default; early
conversions of this network say 0.9, which makes them the statistics of about one batch (no matter
where BatchNorm is frozen).
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dist_proxygml.backbones.gradient_checkpointing import checkpointed


class Block(NamedTuple):
    """Output channels of the branches of an inception block; without `direct` it halves the map."""

    direct: int | None  # 1x1
    single: tuple[int, int]  # 1x1 reduction, then 3x3
    double: tuple[int, int]  # 1x1 reduction, then 3x3 twice
    projected: int | None  # pooling, then 1x1; None passes the pooled input through
    pool: Literal["average", "max"] = "average"

    def num_outputs(self, num_inputs: int) -> int:
        """Output channels of the concatenated branches."""
        passed = num_inputs if self.projected is None else self.projected
        return (self.direct or 0) + self.single[1] + self.double[1] + passed

    @property
    def stride(self) -> int:
        """Step of the block's last convolutions and of its pool."""
        return 2 if self.direct is None else 1


def inception_blocks() -> dict[str, Block]:
    """Return the ten blocks in order, by the prefix of their layers' names."""
    return {
        "inception_3a": Block(64, (64, 64), (64, 96), 32),
        "inception_3b": Block(64, (64, 96), (64, 96), 64),
        "inception_3c": Block(None, (128, 160), (64, 96), None, "max"),
        "inception_4a": Block(224, (64, 96), (96, 128), 128),
        "inception_4b": Block(192, (96, 128), (96, 128), 128),
        "inception_4c": Block(160, (128, 160), (128, 160), 128),
        "inception_4d": Block(96, (128, 192), (160, 192), 128),
        "inception_4e": Block(None, (128, 192), (192, 256), None, "max"),
        "inception_5a": Block(352, (192, 320), (160, 224), 128),
        "inception_5b": Block(352, (192, 320), (192, 224), 128, "max"),
    }


class BNInception(nn.Module):
    """BN-Inception without its classifier: 10,270,240 parameters, 1024 features at stride 32."""

    num_features = 1024

    def __init__(self) -> None:
        super().__init__()
        self._add("conv1_7x7_s2", 3, 64, kernel=7, stride=2)
        self._add("conv2_3x3_reduce", 64, 64)
        self._add("conv2_3x3", 64, 192, kernel=3)
        num_channels = 192
        self.blocks = inception_blocks()
        for name, block in self.blocks.items():
            if block.direct is not None:
                self._add(f"{name}_1x1", num_channels, block.direct)
            reduced, outputs = block.single
            self._add(f"{name}_3x3_reduce", num_channels, reduced)
            self._add(f"{name}_3x3", reduced, outputs, kernel=3, stride=block.stride)
            reduced, outputs = block.double
            self._add(f"{name}_double_3x3_reduce", num_channels, reduced)
            self._add(f"{name}_double_3x3_1", reduced, outputs, kernel=3)
            self._add(f"{name}_double_3x3_2", outputs, outputs, kernel=3, stride=block.stride)
            if block.projected is not None:
                self._add(f"{name}_pool_proj", num_channels, block.projected)
            num_channels = block.num_outputs(num_channels)
        assert num_channels == self.num_features
        self._call: Callable[..., Tensor] = _plainly

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the inputs of the stem and of the ten blocks for the backward pass, or everything again."""
        self._call = checkpointed if enable else _plainly

    def forward(self, pixels: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b 1024 h w"]:
        """Compute the feature map of normalised BGR images of any size."""
        x = self._call(self._stem, pixels)
        for name, block in self.blocks.items():
            x = self._call(self._inception, name, block, x)
        return x

    def _stem(self, pixels: Tensor) -> Tensor:
        x = self._convolve("conv1_7x7_s2", pixels)
        x = F.max_pool2d(x, 3, stride=2, ceil_mode=True)
        x = self._convolve("conv2_3x3", self._convolve("conv2_3x3_reduce", x))
        return F.max_pool2d(x, 3, stride=2, ceil_mode=True)

    def _inception(self, name: str, block: Block, x: Tensor) -> Tensor:
        branches = [] if block.direct is None else [self._convolve(f"{name}_1x1", x)]
        branches.append(self._convolve(f"{name}_3x3", self._convolve(f"{name}_3x3_reduce", x)))
        double = self._convolve(f"{name}_double_3x3_1", self._convolve(f"{name}_double_3x3_reduce", x))
        branches.append(self._convolve(f"{name}_double_3x3_2", double))
        if block.pool == "average":
            pooled = F.avg_pool2d(x, 3, stride=1, padding=1)  # the padding's zeros count
        elif block.stride == 2:
            # For an odd map the convolutions give one row more than the pool; zero padding, which never
            # exceeds a ReLU's output, aligns them. The published 224 pixels give even maps here.
            x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))
            pooled = F.max_pool2d(x, 3, stride=2, ceil_mode=True)
        else:
            pooled = F.max_pool2d(x, 3, stride=1, padding=1)
        branches.append(pooled if block.projected is None else self._convolve(f"{name}_pool_proj", pooled))
        return torch.cat(branches, dim=1)

    def _add(self, name: str, inputs: int, outputs: int, *, kernel: int = 1, stride: int = 1) -> None:
        self.add_module(name, nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2))
        self.add_module(f"{name}_bn", nn.BatchNorm2d(outputs))

    def _convolve(self, name: str, x: Tensor) -> Tensor:
        normalised: Tensor = getattr(self, f"{name}_bn")(getattr(self, name)(x))
        return F.relu(normalised, inplace=True)


def _plainly(function: Callable[..., Tensor], *args: Any) -> Tensor:
    return function(*args)
