"""Images of a size that a network does not take are refused before data is touched, with remedies that work."""

import re
from pathlib import Path
from typing import Any

import pytest

from dist_proxygml import doctor
from dist_proxygml.backbones.build import build_backbone
from dist_proxygml.backbones.image_size import SizeRule, check_sizes, left_out, size_rule
from dist_proxygml.config import BackboneConfig, Config
from dist_proxygml.training.checks import check_run
from tests.trained_runs import configuration

TINY = {"depth": 1, "embed_dim": 12, "num_heads": 2}
DINOV2, DINOV3 = "timm/vit_small_patch14_dinov2", "timm/vit_small_patch16_dinov3"
ROPE = {"depth": 1, "embed_dim": 24, "num_heads": 2}  # its rotation takes dimensions in fours


def config(name: str, options: dict[str, Any], train: int, test: int) -> Config:
    data = {"shards": "/nowhere", "num_classes": 3}
    data["train_transform"], data["test_transform"] = ({"name": "resize", "size": size} for size in (train, test))
    return configuration(
        "small", Path("unused"), 3, backbone={"name": name, "embedding_dim": 4, "options": options}, data=data
    )


@pytest.mark.parametrize(
    ("name", "options", "train", "test", "message", "remedy"),
    [
        (
            *(DINOV2, TINY, 224, 224),
            f"expected 518 x 518 pixels by {DINOV2}, got 224 by data.train_transform.size; set backbone.options."
            "img_size=224 (position embeddings are resampled), or set data.train_transform.size to 518",
            {"options": TINY | {"img_size": 224}},
        ),
        (
            *(DINOV2, TINY | {"img_size": 224}, 224, 256),
            "data.test_transform.size and backbone.options.img_size=252 or 266",
            {"options": TINY | {"img_size": 252}, "train": 252, "test": 252},
        ),
        (*(DINOV3, ROPE, 224, 230), "multiple of 16 pixels.*set data.test_transform.size to 224 or 240", {"test": 240}),
        (
            *(DINOV2, TINY | {"dynamic_img_size": True}, 5, 28),
            "multiple of 14 pixels.*set data.train_transform.size to 14$",
            {"train": 14},
        ),
        (
            *("timm/swin_tiny_patch4_window7_224", {"depths": [1, 1, 1, 1], "embed_dim": 24}, 112, 112),
            "expected 224 x 224.*img_size=112",
            {"options": {"depths": [1, 1, 1, 1], "embed_dim": 24, "img_size": 112}},
        ),
        (*("torchvision/vit_b_32", {}, 64, 64), "image_size to 64", {"options": {"image_size": 64}}),
        (*("iresnet18", {}, 112, 128), "expected 112 x 112.*set data.test_transform.size to 112", {"test": 112}),
        (*("timm/gmlp_ti16_224", {}, 128, 128), "224.*img_size to 128", {"options": {"img_size": 128}}),
    ],
)
def test_another_size_is_refused_before_data_is_touched_and_the_remedy_works(
    name: str, options: dict[str, Any], train: int, test: int, message: str, remedy: dict[str, Any] | None
) -> None:
    with pytest.raises(ValueError, match=message if ".*" in message else re.escape(message)) as refused:
        check_run(config(name, options, train, test), world_size=1, is_start=True)
    assert "/nowhere" not in str(refused.value)
    if remedy is not None:
        fitting = config(name, **({"options": options, "train": train, "test": test} | remedy))
        check_sizes(build_backbone(fitting.backbone), fitting, 2)
        with pytest.raises(ValueError, match="/nowhere"):  # that is next
            check_run(fitting, world_size=1, is_start=True)


def test_only_what_was_tried_is_offered() -> None:
    fixed = "timm/vit_tiny_patch16_224"
    offered = config(fixed, TINY | {"dynamic_img_size": False}, 64, 64)
    with pytest.raises(ValueError, match="img_size=64"):
        check_sizes(build_backbone(offered.backbone), offered, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dist_proxygml.backbones.image_size._can_be_built_for", lambda *_: False)
        with pytest.raises(ValueError, match=r"got 64 by \S+; set data\.train_transform\.size to 224$"):
            check_sizes(build_backbone(offered.backbone), offered, 2)


@pytest.mark.parametrize(
    ("name", "options", "rule"),
    [
        (DINOV2, {}, SizeRule(518, 14)),
        (DINOV2, {"img_size": 224}, SizeRule(224, 14)),
        (DINOV2, {"dynamic_img_size": True}, SizeRule(None, 14)),
        (DINOV3, {}, SizeRule(None, 16)),
        ("timm/vit_base_patch16_siglip_224", {}, SizeRule(224, 16)),
        ("timm/convnext_tiny", {}, SizeRule(None, 1)),
        ("small_cnn", {}, SizeRule(None, 1)),
        ("iresnet50", {}, SizeRule(112, 112)),
        ("timm/no_such_network", {}, SizeRule(None, 1)),
    ],
)
def test_the_rule_of_a_network(name: str, options: dict[str, Any], rule: SizeRule) -> None:
    assert size_rule(BackboneConfig(name=name, options=options)) == rule


def test_pixels_that_no_patch_covers_are_told() -> None:
    odd = config("timm/vit_tiny_patch16_224", TINY | {"img_size": 225}, 225, 225)
    told = left_out(build_backbone(odd.backbone), odd)
    assert told is not None
    assert re.search(r"16 pixels.* last 1 .*data\.train_transform\.size", told)
    even = config("timm/vit_tiny_patch16_224", TINY | {"img_size": 224}, 224, 224)
    assert left_out(build_backbone(even.backbone), even) is None


@pytest.mark.parametrize(
    ("options", "size", "status", "text"),
    [
        (TINY, 224, "problem", "518.*img_size=224"),
        (TINY | {"img_size": 28}, 28, "ok", "28 pixels in training"),
        (TINY | {"img_size": 30}, 30, "warning", "last 2 "),
    ],
)
def test_the_doctor_says_it_too(options: dict[str, Any], size: int, status: str, text: str) -> None:
    (found,) = doctor.check_backbone(config(DINOV2, options, size, size))
    assert found.status == status
    assert re.search(text, found.text)
