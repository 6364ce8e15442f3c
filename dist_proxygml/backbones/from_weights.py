"""What a configuration leaves to the weights: the network behind a name, its colours, the size and cut of images.

    backbone   timm/hf-hub:ORG/NAME, timm/local-dir:FOLDER -> the architecture, its options, where the weights are
               mean, std                                   <- pretrained_cfg of timm, transforms of torchvision
    images     size, interpolation                         <- likewise
               resize of center_crop                       <- size / crop_pct, rounded down as timm does

`fill_from_weights` replaces every null of these by a value. The start of a run calls it, so that the run's config.json,
its checkpoints and its exports hold values: whoever embeds, searches or serves with them asks neither the Hub nor
another version of timm. What is set is never changed.

Chosen: timm's registry, the config.json that timm writes for the Hub and for folders, and timm's resolve_data_config.
Declined: a test size of its own (`test_input_size`), crop_mode "squash" (take the transform `resize`), and images that
are not square.
"""

import json
import math
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torchvision
from huggingface_hub import hf_hub_download
from timm.data.config import resolve_data_config

from dist_proxygml.config import BackboneConfig, Config, TransformConfig

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and std of torchvision's networks where none is configured."""


class InputFacts(NamedTuple):
    """How images were prepared for a network's weights."""

    size: int
    interpolation: str
    crop: float | Fraction
    """Side of the central crop by the shorter side of the image."""

    def resize(self, size: int) -> int:
        """The shorter side that a crop of `size` is taken from."""
        return math.floor(size / self.crop)


class TimmSource(NamedTuple):
    """A network outside timm's registry, as its config.json describes it."""

    architecture: str
    options: dict[str, Any]
    cfg: dict[str, Any]
    """timm's pretrained_cfg."""


def fill_from_weights(config: Config) -> Config:
    """Replace what is null and known from the weights; the same configuration if nothing is.

    Raises:
        ValueError: a Hub or a folder does not answer, or nothing is known of what is null.
    """
    backbone, data = resolve_backbone(config.backbone), {}
    preset = _torchvision_preset(backbone)
    if preset is not None and backbone.mean is None:
        backbone = backbone.model_copy(update={"mean": tuple(preset.mean), "std": tuple(preset.std)})
    for name in ("train_transform", "test_transform"):
        transform = getattr(config.data, name)
        filled = _filled(transform, backbone, setting=f"data.{name}")
        if filled is not transform:
            data[name] = filled
    changed: dict[str, Any] = {} if backbone is config.backbone else {"backbone": backbone}
    if data:
        changed["data"] = config.data.model_copy(update=data)
    return config.model_copy(update=changed) if changed else config


def resolve_backbone(config: BackboneConfig) -> BackboneConfig:
    """Name the architecture behind a Hub's name or a folder, and fill in mean and std of timm's networks.

    A configuration with mean and std and a plain name is returned as it is, and nothing is read for it.

    Raises:
        ValueError: the Hub or the folder does not answer, or describes another network than backbone.name.
    """
    family, _, name = config.name.partition("/")
    of_name = weight_source(name) if family == "timm" else None
    source = of_name or (weight_source(config.pretrained) if config.pretrained and family == "timm" else None)
    if of_name is None and (family != "timm" or config.mean is not None or config.pretrained == "package"):
        return config
    if source is None:
        cfg = _registered(name)
        return config if cfg is None else config.model_copy(update=_colours(cfg))
    found = read_timm_source(source)
    if of_name is None and found.architecture != name.partition(".")[0]:
        raise ValueError(
            f"expected weights of {config.name} at backbone.pretrained {source}, found those of timm/"
            f"{found.architecture}; correct one of them"
        )
    update: dict[str, Any] = {"options": found.options | config.options}
    if of_name is not None:
        update["name"] = f"timm/{found.architecture}"
        if config.pretrained == "timm":
            update["pretrained"] = source
    if config.mean is None:
        update |= _colours(found.cfg)
    return config.model_copy(update=update)


def with_colours(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a checkpoint, flat, with the mean and std that earlier versions had and did not store."""
    name, pretrained = str(settings.get("backbone.name")), settings.get("backbone.pretrained")
    family, _, network = name.partition("/")
    if "backbone.mean" in settings or weight_source(pretrained or "") or pretrained == "package":
        return dict(settings)
    cfg = _registered(network) if family == "timm" else None
    colours: Mapping[str, tuple[float, ...]] = {} if cfg is None else _colours(cfg)
    if family == "torchvision":
        colours = dict(zip(("mean", "std"), IMAGENET, strict=True))
    return {**settings, **{f"backbone.{key}": list(values) for key, values in colours.items()}}


def weight_source(text: str) -> str | None:
    """Normalise "hf-hub:ORG/NAME" (timm also writes hf_hub) or "local-dir:FOLDER"; None if it is neither."""
    kind, colon, place = text.partition(":")
    kind = {"hf_hub": "hf-hub"}.get(kind, kind)
    return f"{kind}:{place}" if kind in ("hf-hub", "local-dir") and colon and place else None


def read_timm_source(source: str) -> TimmSource:
    """Read config.json of "hf-hub:ORG/NAME" or "local-dir:FOLDER".

    Options are those that the architecture needs to be the network of the weights, the size of its images among them.

    Raises:
        ValueError: it cannot be had, or is not what timm writes.
    """
    kind, _, place = source.partition(":")
    try:
        path = _fetched(place) if kind == "hf-hub" else Path(place) / "config.json"
        about = json.loads(path.read_text(encoding="utf-8"))
        architecture, cfg = str(about["architecture"]), dict(about.get("pretrained_cfg", about))  # old files are flat
        options = {name: value for name, value in about.get("model_args", {}).items() if name != "num_classes"}
    except Exception as error:  # networks, hubs and JSON raise many types
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        remedy = (
            "name another, or without access to the internet fetch the repository elsewhere and say local-dir:FOLDER"
            if kind == "hf-hub"
            else "correct the path"
        )
        raise ValueError(f"expected a network of timm's with its config.json at {source}: {reason}; {remedy}") from None
    if not timm.is_model(architecture):
        raise ValueError(
            f"expected an architecture of timm's in config.json of {source}, got {architecture!r}, which timm "
            f"{timm.__version__} does not have; install a newer timm, or name another network"
        )
    if cfg.get("fixed_input_size") and "input_size" in cfg and not options.get("dynamic_img_size"):
        options.setdefault("img_size", cfg["input_size"][-1])
    return TimmSource(architecture, options, cfg)


def input_facts(backbone: BackboneConfig) -> InputFacts | None:
    """How images were prepared for the weights of a resolved backbone; None where nobody says.

    Raises:
        ValueError: as `read_timm_source`; or a side differs from the other, or the interpolation is another one.
    """
    family, _, name = backbone.name.partition("/")
    if backbone.name == "bn_inception":
        return InputFacts(224, "bilinear", Fraction(224, 256))  # the published test transform
    if backbone.name.startswith("iresnet"):
        return InputFacts(112, "bilinear", 1.0)  # faces are aligned to this size
    if (preset := _torchvision_preset(backbone)) is not None:
        (size,), (shorter,) = preset.crop_size, preset.resize_size
        size_now = backbone.options.get("image_size", size)
        return InputFacts(size_now, str(preset.interpolation.value), Fraction(size, shorter))
    if family != "timm":
        return None
    source = weight_source(backbone.pretrained or "")
    cfg = _registered(name) if source is None else read_timm_source(source).cfg
    if cfg is None:
        return None
    facts = _prepared(cfg)
    size = backbone.options.get("img_size") or facts["input_size"][1:]
    sides = {size} if isinstance(size, int) else set(size)
    interpolation = facts["interpolation"]
    if len(sides) > 1 or interpolation not in ("bilinear", "bicubic"):
        raise ValueError(
            f"expected weights for square images, resized bilinear or bicubic, got {sorted(sides)} and "
            f"{interpolation!r} of {backbone.name}; set size, resize and interpolation of both transforms"
        )
    return InputFacts(sides.pop(), interpolation, float(facts["crop_pct"]))


def _filled(transform: TransformConfig, backbone: BackboneConfig, *, setting: str) -> TransformConfig:
    missing = [name for name in ("size", "resize", "interpolation") if getattr(transform, name, 0) is None]
    if not missing:
        return transform
    facts = input_facts(backbone)
    if facts is None:
        raise ValueError(
            f"expected {' and '.join(f'{setting}.{name}' for name in missing)}, got null, and nothing is known of how "
            f"images were prepared for {backbone.name}; set {'it' if len(missing) == 1 else 'them'}"
        )
    size = transform.size or facts.size
    known = {"size": size, "resize": facts.resize(size), "interpolation": facts.interpolation}
    return transform.model_copy(update={name: known[name] for name in missing})


def _torchvision_preset(backbone: BackboneConfig) -> Any:
    """How torchvision prepares images for its newest weights of a network; None for an unknown one."""
    family, _, name = backbone.name.partition("/")
    if family != "torchvision" or name not in torchvision.models.list_models(torchvision.models):
        return None
    return torchvision.models.get_model_weights(name).DEFAULT.transforms()


def _registered(name: str) -> dict[str, Any] | None:
    """timm's pretrained_cfg of a name with or without a tag; None for an unknown one."""
    if weight_source(name) or not timm.is_model(name):
        return None
    cfg: Any = timm.get_pretrained_cfg(name)
    return None if cfg is None else dict(cfg.to_dict())


def _colours(cfg: dict[str, Any]) -> dict[str, tuple[float, ...]]:
    facts = _prepared(cfg)
    colours = {name: tuple(map(float, facts[name])) for name in ("mean", "std")}
    return colours if all(len(values) == 3 for values in colours.values()) else {}


def _prepared(cfg: dict[str, Any]) -> dict[str, Any]:
    """How timm prepares images, with its defaults for what a pretrained_cfg does not say."""
    resolve: Any = resolve_data_config
    return dict(resolve(pretrained_cfg=cfg))


def _fetched(repository: str) -> Path:
    name, _, revision = repository.partition("@")
    return Path(hf_hub_download(name, "config.json", revision=revision or None))
