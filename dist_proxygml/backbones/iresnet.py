"""IResNet, the network of the ArcFace paper and of face recognition since: images of 112 x 112 to embeddings.

    stem     3x3 convolution to 64 channels, BatchNorm, PReLU            no pooling: 112 x 112 stays
    stages   64, 128, 256, 512 channels, each halves the map             -> 7 x 7
    unit     x -> shortcut(x) + BN(conv(PReLU(BN(conv(BN(x))))))         the second convolution has the stride
    output   BatchNorm, dropout, flatten | linear, BatchNorm             25,088 numbers | the embedding

Sources: He, Zhang, Ren, Sun 2016, "Identity Mappings in Deep Residual Networks"; Deng, Guo, Xue, Zafeiriou 2019,
"ArcFace", section 3.2.2 (the improved residual unit and output E of its ablation); Han, Kim, Kim 2017 for the unit.
Names of layers are those of insightface's arcface_torch (`conv1`, `layer1.0.bn1`, ..., `fc`, `features`), whose
backbone.pth loads by strict names. Its preprocessing is (pixel / 255 - 0.5) / 0.5, RGB.

The linear layer and the BatchNorm after it are the embedding layer (`backbone.embedding_dim` numbers), which a warm-up
epoch trains alone; the scale of that BatchNorm stays 1, as the embedding is normalised anyway. All depths have units of
two convolutions, so the number of a name counts them (a 50 here is not ResNet-50).
Declined: other image sizes, which the linear layer would have to be made for.
"""

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

SIDE = 112
_FINAL = 7  # side of the last map


class Depth(NamedTuple):
    """Units of the four stages."""

    first: int
    second: int
    third: int
    fourth: int


def depths() -> dict[str, Depth]:
    """Return the published depths by name."""
    return {
        "iresnet18": Depth(2, 2, 2, 2),
        "iresnet34": Depth(3, 4, 6, 3),
        "iresnet50": Depth(3, 4, 14, 3),
        "iresnet100": Depth(3, 13, 30, 3),
        "iresnet200": Depth(6, 26, 60, 6),
    }


class Unit(nn.Module):
    """The improved residual unit; the shortcut is a convolution where the shape changes."""

    def __init__(self, num_inputs: int, num_outputs: int, *, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(num_inputs)
        self.conv1 = nn.Conv2d(num_inputs, num_outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(num_outputs)
        self.prelu = nn.PReLU(num_outputs)
        self.conv2 = nn.Conv2d(num_outputs, num_outputs, 3, stride, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(num_outputs)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or num_inputs != num_outputs:
            shortcut = nn.Conv2d(num_inputs, num_outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(num_outputs))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        """Return the unit's output, of half the side if its stride is 2."""
        y = self.prelu(self.bn2(self.conv1(self.bn1(x))))
        shortcut = x if self.downsample is None else self.downsample(x)
        return shortcut + self.bn3(self.conv2(y))


class IResNet(nn.Module):
    """The whole network, normalised RGB [b, 3, 112, 112] -> [b, embedding_dim], not of unit length.

    Args:
        depth: units of the stages.
        embedding_dim: outputs of `fc`.
        dropout: share of the 25,088 numbers before `fc` that training leaves out; 0.4 in the paper.
    """

    num_features = 512 * _FINAL * _FINAL

    def __init__(self, depth: Depth, embedding_dim: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
            raise ValueError(f"expected backbone.options.dropout from 0 to below 1, got {dropout!r}; change it")
        self.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.prelu = nn.PReLU(64)
        widths, stages = (64, 64, 128, 256, 512), []
        for stage, num_units in enumerate(depth):
            units = [Unit(widths[stage], widths[stage + 1], stride=2)]
            units += [Unit(widths[stage + 1], widths[stage + 1], stride=1) for _ in range(num_units - 1)]
            stages.append(nn.Sequential(*units))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.bn2 = nn.BatchNorm2d(512)
        self.dropout = nn.Dropout(dropout)
        self.fc: nn.Module = nn.Linear(self.num_features, embedding_dim)
        scaled: nn.Module = nn.BatchNorm1d(embedding_dim)
        scaled.weight.requires_grad_(False)
        self.features: nn.Module = scaled
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # He et al. 2015, by the number of outputs
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, pixels: Float[Tensor, "b 3 112 112"]) -> Float[Tensor, "b D"]:
        """Compute embeddings, or what `fc` takes once `split_embedding` has taken it away."""
        x = self.prelu(self.bn1(self.conv1(pixels)))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
        embeddings: Tensor = self.features(self.fc(self.dropout(self.bn2(x)).flatten(1)))
        return embeddings

    def split_embedding(self) -> nn.Sequential:
        """Take `fc` and `features` out of the network and return them, names kept."""
        embedding = nn.Sequential()
        embedding.add_module("fc", self.fc)
        embedding.add_module("features", self.features)
        self.fc, self.features = nn.Identity(), nn.Identity()
        return embedding
