"""Whether a network takes images of the sizes that a run prepares, before any data is touched, and what to do if not.

A forward pass on meta tensors says whether: it costs no arithmetic and knows every network. Where a network fixes the
size of its images (transformers with learned position embeddings) or takes multiples of a patch only, the message says
which, and offers only what was tried in the same way.
"""

from typing import Any, NamedTuple

import timm
import torch

from dist_proxygml.backbones.build import EmbeddingModel, build_backbone, on_meta
from dist_proxygml.backbones.from_weights import resolve_backbone
from dist_proxygml.backbones.iresnet import SIDE, depths
from dist_proxygml.config import BackboneConfig, Config


class SizeRule(NamedTuple):
    """The sizes of images that a network takes."""

    fixed: int | None
    """The only side, unless the network is built for another one; None: any multiple."""
    multiple: int
    """Pixels that a side consists of: those of a patch; 1 where there are none."""


def size_rule(config: BackboneConfig) -> SizeRule:
    """The rule of a network that can be built; of one that cannot, no rule."""
    if config.name in depths():
        return SizeRule(SIDE, SIDE)
    try:
        config = resolve_backbone(config)
        with torch.device("meta"):
            model = build_backbone(config.model_copy(update={"pretrained": None}), load_pretrained=False)
    except Exception:  # who builds it for good explains
        return SizeRule(None, 1)
    return _rule_of(model, config)


def check_sizes(model: EmbeddingModel, config: Config, batch_size: int) -> None:
    """Pass images of both transforms through a model that `config` describes, a training batch and one test image.

    Raises:
        ValueError: it refuses them; the message names the setting. Or a size is null.
    """
    for name, num_images in (("train_transform", batch_size), ("test_transform", 1)):
        model.train(name == "train_transform")
        side = getattr(config.data, name).side
        check_images(model, config.backbone, num_images, size=side, setting=f"data.{name}.size")


def left_out(model: EmbeddingModel, config: Config) -> str | None:
    """Say which pixels a network never sees, because a side is no multiple of its patch; None if it sees all."""
    multiple = _rule_of(model, config.backbone).multiple
    for name in ("train_transform", "test_transform"):
        rest = getattr(config.data, name).side % multiple
        if rest:
            return (
                f"{config.backbone.name} has patches of {multiple} pixels, and never sees the last {rest} of each row "
                f"and column of images of data.{name}.size"
            )
    return None


def check_images(model: EmbeddingModel, config: BackboneConfig, batch_size: int, *, size: int, setting: str) -> None:
    """Check that the model accepts images of the size given by `setting`.

    Raises:
        ValueError: it does not.
    """
    try:
        on_meta(model, torch.empty(batch_size, 3, size, size, dtype=torch.uint8, device="meta"))
    except NotImplementedError:  # a kernel without a meta implementation: the first step will show
        return
    except Exception as error:  # of any type: assertions of libraries, empty shapes
        if known := _known_reason(model, config, size, setting=setting):
            raise ValueError(known) from None
        is_torchvision = config.name.startswith("torchvision/")
        remedy = f"backbone.options.{'image_size' if is_torchvision else 'img_size'} to {size}"
        raise ValueError(
            f"expected images that {config.name} takes, got {batch_size} of {size} x {size} pixels by {setting}: "
            f"{' '.join(str(error).split()) or type(error).__name__}; change {setting}"
            + (f", or, where the network fixes its images' size, set {remedy}" if "/" in config.name else "")
        ) from None


def _known_reason(model: EmbeddingModel, config: BackboneConfig, size: int, *, setting: str) -> str | None:
    fixed, multiple = _rule_of(model, config)
    if config.name in depths() and size != SIDE:
        return f"expected {SIDE} x {SIDE} pixels by {config.name}, got {size} by {setting}; set {setting} to {SIDE}"
    multiples = sorted({max(multiple, size // multiple * multiple), -(-size // multiple) * multiple})
    if fixed is not None and fixed != size:
        sides = [side for side in multiples if _can_be_built_for(config, side)]
        both = "" if size in sides else f"{setting} and "
        resampled = (
            f"set {both}backbone.options.img_size={' or '.join(map(str, sides))} (position embeddings are resampled)"
        )
        return (
            f"expected {fixed} x {fixed} pixels by {config.name}, got {size} by {setting}; "
            f"{f'{resampled}, or ' if sides else ''}set {setting} to {fixed}"
        )
    if size % multiple:
        return (
            f"expected a multiple of {multiple} pixels, the side of a patch of {config.name}, got {size} by {setting}; "
            f"set {setting} to {' or '.join(map(str, multiples))}"
        )
    return None


def _rule_of(model: EmbeddingModel, config: BackboneConfig) -> SizeRule:
    """As timm's transformers say it of themselves."""
    if config.name in depths():
        return SizeRule(SIDE, SIDE)
    network: Any = getattr(model.trunk, "model", model.trunk)
    patches = getattr(network, "patch_embed", None)
    size, patch = getattr(patches, "img_size", None), getattr(patches, "patch_size", None)
    if not (config.name.startswith("timm/") and isinstance(patch, tuple)):
        return SizeRule(None, 1)
    is_fixed = isinstance(size, tuple) and size[0] == size[1] and getattr(patches, "strict_img_size", False)
    return SizeRule(size[0] if is_fixed and size else None, patch[0])


def _can_be_built_for(config: BackboneConfig, side: int) -> bool:
    options = {key: value for key, value in config.options.items() if key != "out_indices"} | {"img_size": side}
    try:
        with torch.device("meta"):
            network: Any = timm.create_model(config.name.partition("/")[2], num_classes=0, **options)
            return bool(torch.is_tensor(network(torch.empty(1, 3, side, side))))
    except Exception:  # networks raise many types
        return False
