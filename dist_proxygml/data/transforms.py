"""Transforms of decoded images of any size to a batch of equal squares, uint8 in and out.

    resize                full image to S x S by area averaging
    center_crop           shorter side to a length, central S x S        (published test transform)
    random_resized_crop   random area and aspect ratio, to S x S, mirror (published augmentation); then the steps of
                          torchvision that are listed as `augment`, see augment.py
    affine_jitter         small images warped and recoloured, computed for the batch at once

A transform takes the images and one random generator per image, finished with before the next one is requested. Its
effect on an image depends on that image and its generator alone, not on the rest of the batch. Values stay uint8:
scaling, mean and colour order belong to the backbone. Images may have any memory layout; cropping and resizing take
half the time with channels last, as decoded. Batches of crops are assembled in memory that a DataLoader's worker shares
with the main process (default_collate), which saves a copy.
Declined: random state inside a transform, and float images in the workers' queue (four times the bytes).
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import default_collate
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as vision

from dist_proxygml.config import (
    AffineJitterConfig,
    CenterCropConfig,
    RandomResizedCropConfig,
    ResizeConfig,
    TransformConfig,
)
from dist_proxygml.data.augment import Augment, own_randomness

T = TypeVar("T")
Transform = Callable[[Sequence[torch.Tensor], Iterable[np.random.Generator]], torch.Tensor]


def build_transform(config: TransformConfig) -> Transform:
    """Build the configured transform: images uint8 [3, h, w] -> a batch uint8 [b, 3, S, S]."""
    match config:
        case ResizeConfig():
            return Resize(config.side, interpolation=_known(config.interpolation, "interpolation"))
        case CenterCropConfig():
            how = _known(config.interpolation, "interpolation")
            return CenterCrop(_known(config.resize, "resize"), config.side, interpolation=how)
        case RandomResizedCropConfig():
            how = _known(config.interpolation, "interpolation")
            steps = [step.model_dump() for step in config.augment]
            augment = Augment(steps, size=config.side) if steps else None
            return RandomResizedCrop(
                config.side, scale=config.scale, flip=config.flip, interpolation=how, augment=augment
            )
        case AffineJitterConfig():
            return AffineJitter(config.side, **config.model_dump(exclude={"name", "size"}))


def _known(value: T | None, setting: str) -> T:
    if value is None:
        raise ValueError(f"expected {setting} of a transform, got null, which the start of a run fills in; set it")
    return value


def check_transform(config: TransformConfig) -> None:
    """Try the configured transform on an image. Raises ValueError if it cannot be built or gives no such batch."""
    transform = build_transform(config)
    if isinstance(transform, RandomResizedCrop) and transform.augment is not None:
        transform.augment.check()
    transform([torch.zeros(3, 97, 80, dtype=torch.uint8)], [np.random.default_rng(0)])


class Resize:
    """Resize the full image to size x size, each pixel the mean of the area it covers.

    Exact for squares reduced by a whole number, antialiased bilinear for other sizes; "bilinear" and "bicubic" are
    antialiased for all sizes.
    """

    def __init__(self, size: int, *, interpolation: str = "area") -> None:
        self.size = size
        self.interpolation = interpolation

    def __call__(self, images: Sequence[torch.Tensor], generators: Iterable[np.random.Generator]) -> torch.Tensor:
        """Resize the images, together if they have the same size."""
        if len({image.shape for image in images}) == 1:
            return self._resize(torch.stack(list(images)))
        return torch.stack([self._resize(image[None])[0] for image in images])

    def _resize(self, images_bchw: torch.Tensor) -> torch.Tensor:
        if self.interpolation == "area":
            return _resize(images_bchw, self.size)
        how = InterpolationMode(self.interpolation)
        resized: torch.Tensor = vision.resize(images_bchw, [self.size, self.size], how, antialias=True)
        return resized


class CenterCrop:
    """Resize the shorter side to `resize`, then crop the central square; pad with black if too small."""

    def __init__(self, resize: int, size: int, *, interpolation: str = "bilinear") -> None:
        self.resize = resize
        self.size = size
        self.interpolation = InterpolationMode(interpolation)

    def __call__(self, images: Sequence[torch.Tensor], generators: Iterable[np.random.Generator]) -> torch.Tensor:
        """Resize and crop the images."""
        resized = [vision.resize(image, [self.resize], self.interpolation, antialias=True) for image in images]
        return default_collate([vision.center_crop(image, [self.size, self.size]) for image in resized])


class RandomResizedCrop:
    """Resize a random crop to size x size, mirrored with probability 1/2 if `flip`; then `augment` it.

    Its share of the area is uniform in `scale`, its aspect ratio log-uniform in 3/4..4/3. Ten
    attempts to fit the crop into the image, then the largest central crop within those ratios
    (Szegedy et al. 2015; the published augmentation of these benchmarks).
    """

    def __init__(
        self,
        size: int,
        *,
        scale: tuple[float, float],
        flip: bool,
        interpolation: str = "bilinear",
        augment: Augment | None = None,
    ) -> None:
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"scale of random_resized_crop must satisfy 0 < low <= high <= 1, got {tuple(scale)}")
        self.size = size
        self.scale = scale
        self.flip = flip
        self.interpolation = InterpolationMode(interpolation)
        self.augment = augment

    def __call__(self, images: Sequence[torch.Tensor], generators: Iterable[np.random.Generator]) -> torch.Tensor:
        """Crop the images, each with its own generator."""
        with contextlib.nullcontext() if self.augment is None else own_randomness():
            return default_collate(
                [self._one(image, generator) for image, generator in zip(images, generators, strict=True)]
            )

    def _one(self, image: torch.Tensor, generator: np.random.Generator) -> torch.Tensor:
        top, left, height, width = self._box(image.shape[1], image.shape[2], generator)
        crop: torch.Tensor = vision.resized_crop(
            image, top, left, height, width, [self.size, self.size], self.interpolation, antialias=True
        )
        crop = crop.flip(-1) if self.flip and generator.random() < 0.5 else crop
        if self.augment is None:
            return crop
        return self.augment(crop.contiguous(), seed=int(generator.integers(1 << 63)))

    def _box(self, height: int, width: int, generator: np.random.Generator) -> tuple[int, int, int, int]:
        for _ in range(10):
            area = height * width * generator.uniform(*self.scale)
            ratio = math.exp(generator.uniform(math.log(3 / 4), math.log(4 / 3)))
            crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < crop_width <= width and 0 < crop_height <= height:
                top = int(generator.integers(0, height - crop_height + 1))
                left = int(generator.integers(0, width - crop_width + 1))
                return top, left, crop_height, crop_width
        crop_width = min(width, round(height * 4 / 3))
        crop_height = min(height, round(width * 4 / 3))
        return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


class AffineJitter:
    """Apply a random affine warp and a random linear colour change to full images.

    Each parameter is uniform within plus or minus the given half-width (see `AffineJitterConfig`).
    The warp samples at twice the final resolution and averages 2 x 2, so that it is as sharp as
    `resize`; images with a side below twice `size` are sampled at `size`. The outside of the image
    has the grey level `fill`.
    """

    def __init__(
        self,
        size: int,
        *,
        degrees: float = 0.0,
        log_scale: float = 0.0,
        shift: float = 0.0,
        shear: float = 0.0,
        brightness: float = 0.0,
        contrast: float = 0.0,
        saturation: float = 0.0,
        hue: float = 0.0,
        flip: bool = False,
        fill: int = 255,
    ) -> None:
        self.size = size
        self.half_widths = np.array(
            [
                math.radians(degrees),
                log_scale,
                shift,
                shift,
                shear,
                shear,
                brightness,
                contrast,
                saturation,
                hue,
            ]
        )
        self.flip = flip
        self.fill = fill

    def __call__(self, images: Sequence[torch.Tensor], generators: Iterable[np.random.Generator]) -> torch.Tensor:
        """Warp and recolour the images, each with its own generator."""
        # Every generator makes the same number of draws, whatever is disabled.
        draws_bk = np.stack([generator.random(len(self.half_widths) + 1) for generator in generators])
        values_bk = (2 * draws_bk[:, :-1] - 1) * self.half_widths
        warp_b23 = self._warp(values_bk[:, :6], mirror_b=self.flip & (draws_bk[:, -1] < 0.5))

        # Images are sampled at a side that depends on each one alone; those of equal side
        # together.
        sides = np.array([2 * self.size if min(image.shape[1:]) >= 2 * self.size else self.size for image in images])
        warped_bchw = torch.empty(len(images), 3, self.size, self.size, dtype=torch.uint8)
        for side in np.unique(sides):
            rows = np.flatnonzero(sides == side)
            sources_bchw = Resize(int(side))([images[int(row)] for row in rows], ())
            warped_bchw[torch.from_numpy(rows)] = self._sample(sources_bchw, warp_b23[rows])
        return self._recolour(warped_bchw, values_bk[:, 6:])

    def _warp(self, values_b6: np.ndarray, *, mirror_b: np.ndarray) -> np.ndarray:
        """Compute the source of each output position, in coordinates from -1 to 1: float32 [b, 2, 3].

        zoom * stretch(aspect, 1/aspect) @ rotation @ shear along x @ mirror, then the shift.
        """
        angle, log_scale, shift_x, shift_y, shear, log_aspect = values_b6.T
        cos, sin, zoom, aspect = (
            np.cos(angle),
            np.sin(angle),
            np.exp(-log_scale),
            np.exp(log_aspect),
        )
        mirror = np.where(mirror_b, -1.0, 1.0)
        rows = [
            [zoom * aspect * cos * mirror, zoom * aspect * (shear * cos - sin), shift_x],
            [zoom / aspect * sin * mirror, zoom / aspect * (shear * sin + cos), shift_y],
        ]
        return np.stack([np.stack(row, axis=1) for row in rows], axis=1).astype(np.float32)

    def _sample(self, sources_bchw: torch.Tensor, warp_b23: np.ndarray) -> torch.Tensor:
        """Sample the warped images at the final size, uint8.

        Written out per element: a batched product may depend on the batch's size.
        """
        side = sources_bchw.shape[-1]
        centers = (torch.arange(side, dtype=torch.float32) * 2 + 1) / side - 1
        x, y = centers[None, None, :], centers[None, :, None]
        warp = torch.from_numpy(warp_b23)[..., None, None]
        grid_bhw2 = torch.stack([warp[:, i, 0] * x + (warp[:, i, 1] * y + warp[:, i, 2]) for i in (0, 1)], dim=-1)
        inside = sources_bchw.float().sub_(self.fill)  # so that the zeros outside mean `fill`
        sampled = F.grid_sample(inside, grid_bhw2, mode="bilinear", padding_mode="zeros", align_corners=False)
        return _to_uint8(_average_cells(sampled, side // self.size).add_(self.fill))

    def _recolour(self, images_bchw: torch.Tensor, values_b4: np.ndarray) -> torch.Tensor:
        """Change brightness, contrast, saturation and hue, combined into one affine map of colours."""
        if not self.half_widths[6:].any():
            return images_bchw
        brightness, contrast, saturation = (1 + values_b4[:, :3]).T
        grey = np.broadcast_to([0.299, 0.587, 0.114], (3, 3))  # luma, ITU-R BT.601
        saturate_b33 = grey + saturation[:, None, None] * (np.eye(3) - grey)
        angle = values_b4[:, 3, None, None]
        cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
        rotate_b33 = np.cos(angle) * np.eye(3) + (1 - np.cos(angle)) / 3 + np.sin(angle) * cross
        colours_b33 = rotate_b33 @ saturate_b33 * brightness[:, None, None]
        mean_b3 = images_bchw.sum(dim=(2, 3), dtype=torch.int64).numpy() / (images_bchw.shape[2] * images_bchw.shape[3])
        offset_b3 = np.einsum("bij,bj->bi", colours_b33, mean_b3 * (1 - contrast[:, None]))
        matrix = torch.from_numpy((colours_b33 * contrast[:, None, None]).astype(np.float32))[..., None, None]
        offset = torch.from_numpy(offset_b3.astype(np.float32))[..., None, None]
        red, green, blue = images_bchw.float().unbind(1)
        result = torch.empty(images_bchw.shape, dtype=torch.float32)
        for channel in range(3):
            row = matrix[:, channel]
            torch.mul(red, row[:, 0], out=result[:, channel])
            result[:, channel].add_(green * row[:, 1]).add_(blue * row[:, 2]).add_(offset[:, channel])
        return _to_uint8(result)


def _resize(images_bchw: torch.Tensor, size: int) -> torch.Tensor:
    height, width = images_bchw.shape[-2:]
    if height == width == size:
        return images_bchw
    if height == width and height % size == 0:
        return _to_uint8(_average_cells(images_bchw.float(), height // size))
    resized: torch.Tensor = vision.resize(images_bchw, [size, size], antialias=True)
    return resized


def _average_cells(images_bchw: torch.Tensor, side: int) -> torch.Tensor:
    """Average every side x side cell.

    Strided sums: several times faster than avg_pool2d on a CPU.
    """
    if side == 1:
        return images_bchw
    columns = images_bchw[..., 0::side].clone()
    for offset in range(1, side):
        columns += images_bchw[..., offset::side]
    cells = columns[..., 0::side, :].clone()
    for offset in range(1, side):
        cells += columns[..., offset::side, :]
    return cells.div_(side * side)


def _to_uint8(values: torch.Tensor) -> torch.Tensor:
    return values.round_().clamp_(0, 255).to(torch.uint8)
