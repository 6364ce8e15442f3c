"""Steps of torchvision by name: what they do to an image, what it depends on, and the message for what cannot work."""

import json
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as vision

from dist_proxygml.config import RandomResizedCropConfig
from dist_proxygml.data.augment import Augment, own_randomness
from dist_proxygml.data.transforms import build_transform, check_transform

SIZE = 16
RECIPE = [
    {"name": "RandAugment", "num_ops": 2, "magnitude": 9, "interpolation": "bilinear"},
    {"name": "RandomApply", "p": 0.7, "transforms": [{"name": "ColorJitter", "brightness": 0.4, "contrast": 0.4}]},
    {"name": "RandomErasing", "p": 0.5, "value": [124, 116, 104]},
]


def crop(*steps: dict[str, Any], size: int = SIZE, **settings: Any) -> RandomResizedCropConfig:
    raw = {"name": "random_resized_crop", "size": size, "augment": list(steps), **settings}
    return RandomResizedCropConfig.model_validate_json(json.dumps(raw))


def images(count: int, side: int = 40) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 256, (3, side, side), dtype=torch.uint8, generator=generator) for _ in range(count)]


def generators(count: int) -> list[np.random.Generator]:
    return [np.random.Generator(np.random.Philox(key=[3, 0], counter=[0, 0, 0, i])) for i in range(count)]


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_the_steps_are_those_of_torchvision_after_crop_and_mirroring() -> None:
    """Crop and mirroring are what they are without steps; then each image's generator gives the seed of its steps."""
    result = build_transform(crop(*RECIPE))(images(6), generators(6))
    assert result.dtype == torch.uint8
    drawn_from = generators(6)
    plain = build_transform(crop())(images(6), drawn_from)
    steps = [
        v2.RandAugment(num_ops=2, magnitude=9, interpolation=v2.InterpolationMode.BILINEAR),
        v2.RandomApply([v2.ColorJitter(brightness=0.4, contrast=0.4)], p=0.7),
        v2.RandomErasing(p=0.5, value=[124, 116, 104]),
    ]
    for image, own, generator in zip(result, plain, drawn_from, strict=True):
        torch.manual_seed(int(generator.integers(1 << 63)))
        for step in steps:
            own = step(own)
        assert torch.equal(image, own)
    assert any(not torch.equal(image, own) for image, own in zip(result, plain, strict=True))


def test_an_image_depends_on_its_generator_alone_and_nothing_global_is_changed() -> None:
    transform = build_transform(crop(*RECIPE))
    together = transform(images(7), generators(7))
    torch.manual_seed(5)
    random.seed(5)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    for i, image in enumerate(images(7)):
        assert torch.equal(transform([image], [generators(7)[i]])[0], together[i])
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert np.array_equal(before[2], np.random.get_state()[1])
    assert not torch.equal(transform(images(1) * 2, generators(2))[0], transform(images(1) * 2, generators(2))[1])


def test_pythons_own_generator_is_seeded_too() -> None:
    augment = Augment([{"name": "Identity"}], size=SIZE)
    draws = []
    for _ in range(2):
        with own_randomness():
            augment(images(1, SIZE)[0], seed=11)
            draws.append(random.random())
    assert draws[0] == draws[1] == random.Random(11).random()


def test_global_state_and_threads_come_back_after_an_error(two_threads: None) -> None:
    before = torch.get_rng_state()
    transform = build_transform(crop({"name": "GaussianBlur", "kernel_size": 99}))  # wider than the image
    with pytest.raises(ValueError, match=r"augment\.0 \(GaussianBlur\)"):
        transform(images(1), generators(1))
    assert torch.get_num_threads() == 2
    assert torch.equal(before, torch.get_rng_state())


def test_the_number_of_threads_changes_no_bit(two_threads: None) -> None:
    """Of 320 x 320 floats torch divides the sum of a mean over threads, and the last bits differ for every second."""
    pixels = [image.float() / 255 for image in images(12, 320)]
    with own_randomness():
        of_two = [vision.adjust_contrast(image, 0.37) for image in pixels]
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    for image, found in zip(pixels, of_two, strict=True):
        assert torch.equal(vision.adjust_contrast(image, 0.37), found)


def test_without_steps_nothing_is_drawn_and_settings_are_as_before() -> None:
    drawn_from, alone = generators(1), generators(1)
    build_transform(crop())(images(1), drawn_from)
    build_transform(RandomResizedCropConfig(name="random_resized_crop", size=SIZE))(images(1), alone)
    assert drawn_from[0].random() == alone[0].random()
    assert crop().model_dump() == {"name": "random_resized_crop", "size": SIZE, "scale": (0.08, 1.0), "flip": True}
    dumped = crop(*RECIPE).model_dump(mode="json")
    assert dumped["augment"] == RECIPE
    assert RandomResizedCropConfig.model_validate_json(json.dumps(dumped)) == crop(*RECIPE)


def test_floats_from_0_to_1_are_rounded_to_bytes() -> None:
    (image,) = images(1, SIZE)
    as_floats = {"name": "ToDtype", "dtype": "float32", "scale": True}
    with own_randomness():
        assert torch.equal(Augment([as_floats], size=SIZE)(image, seed=0), image)
        inverted = Augment([as_floats, {"name": "RandomInvert", "p": 1}], size=SIZE)(image, seed=0)
    assert torch.equal(inverted, 255 - image)


@pytest.mark.parametrize(
    "step",
    [
        {"name": "AutoAugment", "policy": "cifar10"},
        {"name": "TrivialAugmentWide"},
        {"name": "AugMix"},
        {"name": "RandomPhotometricDistort"},
        {"name": "GaussianNoise", "sigma": 0.2},
        {"name": "RandomAffine", "degrees": 30, "translate": [0.1, 0.2], "interpolation": "bilinear"},
        {"name": "RandomChoice", "transforms": [{"name": "JPEG", "quality": [20, 90]}, {"name": "Identity"}]},
        {"name": "RandomOrder", "transforms": [{"name": "RandomPosterize", "bits": 3}, {"name": "RandomInvert"}]},
        {"name": "RandomCrop", "size": SIZE, "padding": 3},
        {"name": "Grayscale", "num_output_channels": 3},
    ],
    ids=lambda step: step["name"],
)
def test_transforms_of_all_kinds_work_and_repeat(step: dict[str, Any]) -> None:
    check_transform(crop(step))
    transform = build_transform(crop(step))
    first = transform(images(8), generators(8))
    torch.rand(3)
    random.random()
    assert torch.equal(first, transform(images(8), generators(8)))
    assert not torch.equal(first, build_transform(crop())(images(8), generators(8)))


@pytest.mark.parametrize(
    ("steps", "found"),
    [
        ([{"name": "RandAugmen"}], r"augment\.0 \(RandAugmen\).*'RandAugment'"),
        ([{"name": "Transform"}], r"augment\.0 \(Transform\)"),
        ([{"name": "Identity"}, {"name": "RandAugment", "magnitud": 3}], r"augment\.1 .*'magnitud'.*'magnitude'"),
        ([{"name": "Identity", "p": 3}], r"augment\.0 \(Identity\).*'p'.*none"),
        ([{"name": "GaussianBlur", "kernel_size": 4}], r"augment\.0 \(GaussianBlur\).*odd"),
        ([{"name": "GaussianBlur"}], r"augment\.0 \(GaussianBlur\).*kernel_size"),
        ([{"name": "RandAugment", "num_ops": "2"}], r"augment\.0 \(RandAugment\).*num_ops"),
        ([{"name": "RandomRotation", "degrees": 9, "interpolation": "bilinera"}], r"'bilinera'"),
        ([{"name": "RandomRotation", "degrees": 9, "interpolation": "bicubic"}], r"\(RandomRotation\).*'bicubic'"),
        (
            [{"name": "RandomApply", "transforms": [{"name": "Blur"}]}],
            r"augment\.0 \(RandomApply\)\.transforms\.0 \(Blur\)",
        ),
        ([{"name": "RandomApply", "transforms": "Blur"}], r"augment\.0 \(RandomApply\)\.transforms .*'Blur'"),
        ([{"name": "RandomErasing", "value": "random"}], r"augment\.0 \(RandomErasing\).*0 to 255"),
        ([{"name": "Resize", "size": 9}], r"\[3, 16, 16\].*\[3, 9, 9\]"),
        ([{"name": "ToPILImage"}], r"got Image"),
        ([{"name": "ToDtype", "dtype": "int64"}], r"int64"),
        ([{"name": "Normalize", "mean": [0.5] * 3, "std": [0.2] * 3}], r"augment\.0 \(Normalize\).*float"),
        (
            [
                {"name": "ToDtype", "dtype": "float32", "scale": True},
                {"name": "Normalize", "mean": [0.5] * 3, "std": [0.2] * 3},
            ],
            r"0 to 1, got -2\.5 to 2\.5",
        ),
        # Once in a thousand images, and so never in a few draws.
        ([{"name": "RandomApply", "p": 0.001, "transforms": [{"name": "Grayscale"}]}], r"\[1, 16, 16\]"),
        ([{"name": "RandomErasing", "p": 0.001, "value": [1, 2]}], r"augment\.0 \(RandomErasing\)"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_cannot_work_is_refused_by_its_place_and_name(steps: list[dict[str, Any]], found: str) -> None:
    with pytest.raises(ValueError, match=found):
        check_transform(crop(*steps))


def test_a_step_that_changes_size_now_and_then_is_found_when_it_does() -> None:
    transform = build_transform(crop({"name": "RandomZoomOut", "p": 1.0}))
    with pytest.raises(ValueError, match=r"\[3, 16, 16\]"):
        transform(images(1), generators(1))


def test_an_augmented_crop_has_its_size_in_any_memory_layout() -> None:
    transform = build_transform(crop(*RECIPE))
    side_by_side = [image.permute(1, 2, 0).contiguous().permute(2, 0, 1) for image in images(5)]
    assert torch.equal(transform(side_by_side, generators(5)), transform(images(5), generators(5)))
    assert vision.get_size(transform(images(1), generators(1))) == [SIZE, SIZE]
