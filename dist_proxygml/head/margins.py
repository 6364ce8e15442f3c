"""Margins on the score of an image's own class, which it must win by.

    cosface    psi(t) = t - m                          Wang et al., "CosFace", CVPR 2018 (arXiv 1801.09414)
    arcface    psi(t) = cos(arccos t + m)              Deng et al., "ArcFace", CVPR 2019 (arXiv 1801.07698); beyond
               t = -cos m, where that rises again, t - m sin m
    adaface    psi(t) = cos(arccos t - m q) - m q - m  Kim et al., "AdaFace", CVPR 2022 (arXiv 2204.00964), eq. 13 to
               16; q in [-1, 1] is how much longer than usual the image's embedding is

The score must be a cosine, or a mean of cosines, for the angular ones. Each gives psi and its slope, since the loss
computes its own gradient. The slope of the angular ones is infinite at t = 1; the sine that it is divided by is kept
above the rounding of a cosine.

Dimension key: o images whose class is at hand, R images.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Margin:
    """A margin.

    Args:
        name: "cosface", "arcface" or "adaface".
        margin: m; in radians for arcface and adaface.
        concentration: h of adaface: q is 1 for embeddings that are 1/h standard deviations longer than the mean.

    Raises:
        ValueError: an unknown name, or a number out of range.
    """

    name: Literal["cosface", "arcface", "adaface"]
    margin: float
    concentration: float = 0.333

    def __post_init__(self) -> None:
        if self.name not in ("cosface", "arcface", "adaface"):
            raise ValueError(f'expected a margin "cosface", "arcface" or "adaface", got {self.name!r}')
        if not 0 <= self.margin < math.pi / 2 or not self.concentration > 0:
            raise ValueError(
                f"expected a margin from 0 to below pi/2 and a concentration above 0, got {self.margin} and "
                f"{self.concentration}"
            )

    @property
    def needs_lengths(self) -> bool:
        """Whether the embeddings' lengths matter."""
        return self.name == "adaface"

    def apply(self, score_o: Tensor, quality_o: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return psi and its slope at the scores; `quality_o` is q of adaface."""
        m = self.margin
        if self.name == "cosface":
            return score_o - m, torch.ones_like(score_o)
        cosine_o = score_o.clamp(-1, 1)
        least = math.sqrt(torch.finfo(score_o.dtype).eps)
        sine_o = (1 - cosine_o.square()).clamp_min(0).sqrt()
        if self.name == "arcface":
            is_beyond_o = cosine_o < -math.cos(m)
            value_o = torch.where(is_beyond_o, score_o - m * math.sin(m), cosine_o * math.cos(m) - sine_o * math.sin(m))
            slope_o = math.cos(m) + math.sin(m) * cosine_o / sine_o.clamp_min(least)
            return value_o, torch.where(is_beyond_o, 1.0, slope_o)
        assert quality_o is not None
        shift_o = -m * quality_o
        angle_o = torch.acos(cosine_o) + shift_o
        value_o = torch.cos(angle_o.clamp(0, math.pi)) - m * quality_o - m
        slope_o = torch.sin(angle_o) / sine_o.clamp_min(least)
        return value_o, torch.where((angle_o > 0) & (angle_o < math.pi), slope_o, 0.0)


class LengthStatistics(nn.Module):
    """Running mean and standard deviation of the embeddings' lengths, and q of adaface by them.

    The first values and the rate are the authors'.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(20.0))
        self.register_buffer("deviation", torch.tensor(100.0))

    @torch.no_grad()
    def forward(self, length_B: Tensor, concentration: float) -> Tensor:
        """Count the lengths of a global batch, in training, and return q of each."""
        length_B = length_B.clamp(1e-3, 100)
        if self.training:
            self.mean.lerp_(length_B.mean().to(self.mean.dtype), 0.01)
            if len(length_B) > 1:
                self.deviation.lerp_(length_B.std().to(self.mean.dtype), 0.01)
        return ((length_B - self.mean) / (self.deviation + 1e-3) * concentration).clamp(-1, 1)
