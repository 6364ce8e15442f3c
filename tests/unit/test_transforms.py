"""Images in, one batch of equal squares out."""

import math
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from dist_proxygml.config import (
    AffineJitterConfig,
    CenterCropConfig,
    RandomResizedCropConfig,
    ResizeConfig,
    TransformConfig,
)
from dist_proxygml.data.transforms import AffineJitter, build_transform

STRONG = AffineJitterConfig(
    name="affine_jitter",
    size=16,
    degrees=20,
    log_scale=0.3,
    shift=0.2,
    shear=0.2,
    brightness=0.3,
    contrast=0.3,
    saturation=0.5,
    hue=0.4,
    flip=True,
)


def random_images(*shapes: tuple[int, int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 256, (3, *shape), dtype=torch.uint8, generator=generator) for shape in shapes]


def generators(count: int, *, epoch: int = 0) -> list[np.random.Generator]:
    return [np.random.Generator(np.random.Philox(key=[3, epoch], counter=[0, 0, 0, i])) for i in range(count)]


def only(size: int, **half_widths: float) -> AffineJitter:
    return AffineJitter(size, **half_widths)  # type: ignore[arg-type]


class Fixed:
    """A generator of equal draws: 0 is the lower end of every range, 0.5 its middle."""

    def __init__(self, value: float) -> None:
        self.value = value

    def random(self, count: int) -> np.ndarray:
        return np.full(count, self.value)


@pytest.mark.parametrize(
    "config",
    [
        ResizeConfig(name="resize", size=16),
        CenterCropConfig(name="center_crop", resize=20, size=16),
        RandomResizedCropConfig(name="random_resized_crop", size=16, scale=(0.2, 1.0)),
        RandomResizedCropConfig(name="random_resized_crop", size=16, interpolation="bicubic"),
        ResizeConfig(name="resize", size=16, interpolation="bicubic"),
        STRONG,
    ],
    ids=lambda config: config.name,
)
def test_an_image_does_not_depend_on_its_neighbours_in_the_batch(config: TransformConfig) -> None:
    transform = build_transform(config)
    images = random_images((32, 32), (40, 33), (16, 16), (9, 50), (32, 32), (31, 90), (7, 7))
    together = transform(images, generators(7))
    assert together.shape == (7, 3, 16, 16)
    assert together.dtype == torch.uint8
    for i, image in enumerate(images):
        assert torch.equal(transform([image], [generators(7)[i]])[0], together[i])


def test_a_large_batch_of_equal_images_is_the_same_as_its_halves() -> None:
    transform = build_transform(STRONG)
    images = random_images(*[(32, 32)] * 37)
    together = transform(images, generators(37))
    halves = [
        transform(images[:18], generators(37)[:18]),
        transform(images[18:], generators(37)[18:]),
    ]
    assert torch.equal(together, torch.cat(halves))


@pytest.mark.parametrize("config", [RandomResizedCropConfig(name="random_resized_crop", size=12), STRONG])
def test_random_transforms_change_with_the_epoch_and_repeat_within_it(
    config: TransformConfig,
) -> None:
    transform = build_transform(config)
    images = random_images((40, 30)) * 5
    first = transform(images, generators(5))
    assert torch.equal(first, transform(images, generators(5)))
    assert not torch.equal(first, transform(images, generators(5, epoch=1)))
    assert not torch.equal(first[0], first[1])  # same image, other id


def test_resizing_by_a_whole_number_averages_cells() -> None:
    (image,) = random_images((24, 24))
    result = build_transform(ResizeConfig(name="resize", size=8))([image], generators(1))[0]
    for channel, row, column in [(0, 0, 0), (1, 3, 5), (2, 7, 7)]:
        cell = image[channel, 3 * row : 3 * row + 3, 3 * column : 3 * column + 3].double()
        assert abs(result[channel, row, column].item() - cell.mean().item()) <= 0.5


def test_the_center_crop_takes_the_middle_of_the_resized_image() -> None:
    image = torch.zeros(3, 20, 40, dtype=torch.uint8)
    image[:, :, 15:25] = 200  # the middle quarter of the width
    transform = build_transform(CenterCropConfig(name="center_crop", resize=20, size=10))
    assert torch.equal(transform([image], generators(1))[0], torch.full((3, 10, 10), 200).byte())


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_pixels_are_interpolated_as_pillow_does_it(interpolation: str) -> None:
    image = random_images((40, 64))[0]
    picture, how = Image.fromarray(image.permute(1, 2, 0).numpy()), Image.Resampling[interpolation.upper()]

    def difference(config: TransformConfig, expected: Image.Image) -> int:
        found = build_transform(config)([image], generators(1))[0].permute(1, 2, 0).numpy().astype(int)
        return int(abs(found - np.asarray(expected, dtype=int)).max())

    whole = ResizeConfig(name="resize", size=20, interpolation=interpolation)  # type: ignore[arg-type]
    assert difference(whole, picture.resize((20, 20), how)) <= 1
    middle = CenterCropConfig(name="center_crop", resize=20, size=16, interpolation=interpolation)  # type: ignore[arg-type]
    assert difference(middle, picture.resize((32, 20), how).crop((8, 2, 24, 18))) <= 1
    crop = RandomResizedCropConfig(
        name="random_resized_crop",
        size=16,
        scale=(1.0, 1.0),
        flip=False,
        interpolation=interpolation,  # type: ignore[arg-type]
    )
    # No crop of the whole area has a ratio below 4/3, so it is the largest central one.
    assert difference(crop, picture.crop((5, 0, 58, 40)).resize((16, 16), how)) <= 1


def test_a_null_that_nobody_filled_in_is_refused() -> None:
    crop = {"resize": 20, "size": 16, "interpolation": "bicubic"}
    for name in crop:
        with pytest.raises(ValueError, match=name):
            build_transform(CenterCropConfig(name="center_crop", **crop | {name: None}))  # type: ignore[arg-type]


def test_a_random_crop_stays_inside_the_image_and_varies_in_place_and_size() -> None:
    image = torch.full((3, 30, 50), 77, dtype=torch.uint8)  # any pixel from outside would be seen
    ramp = torch.arange(50, dtype=torch.uint8).expand(3, 30, 50)
    transform = build_transform(
        RandomResizedCropConfig(name="random_resized_crop", size=11, scale=(0.1, 0.6), flip=True)
    )
    assert (transform([image] * 50, generators(50)) == 77).all()
    crops = transform([ramp] * 50, generators(50)).double()
    rises = crops[:, 0, 0, -1] - crops[:, 0, 0, 0]
    assert 10 < int((rises < 0).sum()) < 40  # about half are mirrored
    assert rises.abs().max() > 2 * rises.abs().min()


def test_without_any_half_width_affine_jitter_is_resize() -> None:
    images = random_images((64, 64), (64, 64), (32, 32))
    still = only(32)(images, generators(3))
    resized = build_transform(ResizeConfig(name="resize", size=32))(images, generators(3))
    assert (still.int() - resized.int()).abs().max() <= 1  # rounding


def test_the_warp_zooms_shifts_and_turns_as_documented() -> None:
    image = torch.full((3, 64, 64), 255, dtype=torch.uint8)
    image[:, 24:40, 24:40] = 0  # a black square of 8 px after reduction, in the middle

    def square(transform: AffineJitter, draw: float) -> tuple[float, float, float]:
        dark = 255 - transform([image], [Fixed(draw)])[0, 0].double()  # type: ignore[list-item]
        rows, columns = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
        mass = dark.sum()
        return (
            float(mass / 255),
            float((rows * dark).sum() / mass) - 15.5,
            float((columns * dark).sum() / mass) - 15.5,
        )

    area, row, column = square(only(32), 0.5)
    assert (area, row, column) == (64, 0, 0)
    area, _, _ = square(only(32, log_scale=math.log(1.5)), 1.0)
    assert area == pytest.approx(64 * 1.5**2, rel=0.05)
    area, _, _ = square(only(32, log_scale=math.log(1.5)), 0.0)
    assert area == pytest.approx(64 / 1.5**2, rel=0.05)
    _, row, column = square(only(32, shift=0.25), 1.0)  # a quarter of half the side is 4 px
    assert (abs(row), abs(column)) == pytest.approx((4, 4), abs=0.05)
    area, row, column = square(only(32, degrees=45), 1.0)
    assert area == pytest.approx(64, rel=0.03)
    turned = only(32, degrees=45)([image], [Fixed(1.0)])[0, 0]  # type: ignore[list-item]
    assert turned[16, 11] < 128 < turned[12, 12]  # a diamond: its tip is out, its corner is in
    area, _, _ = square(only(32, shear=0.3), 1.0)
    assert area == pytest.approx(64, rel=0.05)  # shear and aspect keep the area
    area, _, _ = square(only(32, degrees=40, shear=0.3), 1.0)
    assert area == pytest.approx(64, rel=0.05)


def test_what_lies_outside_the_image_is_the_fill() -> None:
    image = torch.full((3, 32, 32), 10, dtype=torch.uint8)
    for fill in (0, 255):
        moved = only(16, shift=1.0, fill=fill)([image], [Fixed(1.0)])[0]  # type: ignore[list-item]
        assert set(moved[:, 0, 0].tolist()) | set(moved[:, -1, -1].tolist()) == {10, fill}


def test_colours_follow_the_formulas() -> None:
    (image,) = random_images((8, 8))
    pixels = image.double()
    low: list[np.random.Generator] = [Fixed(0.0)]  # type: ignore[list-item]

    def close(result: torch.Tensor, expected: torch.Tensor) -> bool:
        return bool(((result[0].double() - expected.clamp(0, 255)).abs() <= 0.51).all())

    assert close(only(8, brightness=0.4)([image], low), 0.6 * pixels)
    mean = pixels.mean(dim=(1, 2), keepdim=True)
    assert close(only(8, contrast=0.4)([image], low), mean + 0.6 * (pixels - mean))
    grey = (pixels * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0)
    assert close(only(8, saturation=0.4)([image], low), grey + 0.6 * (pixels - grey))
    # A third of a turn about the grey axis permutes the channels.
    third: list[np.random.Generator] = [Fixed(1.0)]  # type: ignore[list-item]
    assert close(only(8, hue=2 * math.pi / 3)([image], third), pixels[[2, 0, 1]])


def test_mirroring_happens_half_of_the_time_and_only_left_to_right() -> None:
    (image,) = random_images((16, 16))
    results = only(16, flip=True)([image] * 200, generators(200))
    mirrored = [torch.equal(result, image.flip(-1)) for result in results]
    assert all(m or torch.equal(r, image) for m, r in zip(mirrored, results, strict=True))
    assert 70 < sum(mirrored) < 130


def test_a_batch_of_32_small_images_is_jittered_in_milliseconds() -> None:
    config = STRONG.model_copy(update={"size": 32})
    transform, images = build_transform(config), random_images(*[(64, 64)] * 32)
    times = []
    for _ in range(20):
        start = time.thread_time()  # of this thread alone, so that other processes do not count
        transform(images, generators(32))
        times.append(time.thread_time() - start)
    assert min(times) < 0.02  # 4 ms on an idle core


@pytest.mark.parametrize(
    "config",
    [
        ResizeConfig(name="resize", size=16),
        ResizeConfig(name="resize", size=13),
        CenterCropConfig(name="center_crop", resize=20, size=16),
        RandomResizedCropConfig(name="random_resized_crop", size=16, scale=(0.2, 1.0)),
        STRONG,
    ],
    ids=lambda config: f"{config.name}-{config.size}",
)
def test_the_result_is_the_same_however_images_lie_in_memory(config: TransformConfig) -> None:
    transform = build_transform(config)
    images = random_images((32, 32), (40, 33), (9, 50), (131, 190), (64, 64))
    side_by_side = [image.permute(1, 2, 0).contiguous().permute(2, 0, 1) for image in images]
    assert not side_by_side[0].is_contiguous()
    result = transform(side_by_side, generators(5))
    assert torch.equal(result, transform(images, generators(5)))
    assert result.is_contiguous()


def test_generators_may_come_one_after_the_other() -> None:
    images = random_images((40, 33), (31, 90))
    for config in (STRONG, RandomResizedCropConfig(name="random_resized_crop", size=16)):
        transform = build_transform(config)
        assert torch.equal(transform(images, iter(generators(2))), transform(images, generators(2)))


def test_crops_are_put_together_in_the_memory_that_workers_share() -> None:
    for config in (
        CenterCropConfig(name="center_crop", resize=20, size=16),
        RandomResizedCropConfig(name="random_resized_crop", size=16),
    ):
        loader = DataLoader(_Transformed(config), batch_size=None, num_workers=1)
        ((batch, is_shared),) = loader
        assert is_shared
        assert torch.equal(batch, _Transformed(config)[0][0])


class _Transformed(Dataset[tuple[torch.Tensor, bool]]):
    """One batch, and whether it lay in shared memory when it was made."""

    def __init__(self, config: TransformConfig) -> None:
        self.transform = build_transform(config)

    def __len__(self) -> int:
        return 1

    def __getitem__(self, position: int) -> tuple[torch.Tensor, bool]:
        batch = self.transform(random_images((40, 33), (31, 90)), generators(2))
        return batch, batch.is_shared()
