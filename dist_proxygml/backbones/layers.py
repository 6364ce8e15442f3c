"""The layers of a trunk, from its stem on: which are frozen, and which settings the optimizer has for each.

    layer 0 the stem (patch embedding, position embedding, class tokens), 1, 2, ... the blocks, last the embedding layer

Layer-wise learning-rate decay: layer l of a trunk whose embedding layer has the number L learns at the backbone's rate
times d^(L - l) (Bao, Dong, Piao, Wei, "BEiT: BERT Pre-Training of Image Transformers", ICLR 2022, appendix; for
convolutions Liu et al., "A ConvNet for the 2020s", CVPR 2022). Block i of n (from 0) so gets d^(n - i), the stem
d^(n + 1), the embedding layer 1.

Weight decay "matrices": biases, scales of norms (all that have one dimension) and embeddings (positions, class tokens,
tables of relative positions) have none.

Chosen: a network of timm says itself which parameter is of which layer (`group_matcher`) and which have no weight decay
(`no_weight_decay`); the embedding layer stands where timm's classifier would, so that factors are those of timm's
`param_groups_layer_decay`. Networks of torchvision whose names show the order have a rule here. What no rule knows is
refused. Declined: guessing layers from the order in which modules were registered, which is not the order of all
networks.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatch
from typing import Any, NamedTuple

from timm.models import group_parameters
from torch import nn

Matcher = Mapping[str, Any] | Callable[[str], tuple[float, ...]]
"""As timm has them: regular expressions of stem and blocks, or a function from a name to a key to sort by."""

_EMBEDDING = "head.weight"  # no rule knows this name: it goes where timm's classifier goes
_WITH_PREVIOUS = 99999  # timm's mark of a final norm, which belongs to the block before it
_NOT_IN_TIMM = ("*class_token", "*pos_embedding", "*relative_position_bias_table", "*layer_scale", "*logit_scale")


class ParameterGroup(NamedTuple):
    """Trained parameters with the same settings."""

    parameters: list[nn.Parameter]
    is_embedding: bool
    """Of the embedding layer, which has its own learning rate and is trained while the trunk is frozen."""
    lr_factor: float
    """On the learning rate of the trunk, or of the embedding layer."""
    decays: bool
    """Whether it has weight decay."""


class Layers(NamedTuple):
    """The layer of every parameter of a trunk."""

    number: dict[str, int]
    """By the parameter's name; 0 is the stem."""
    embedding: int
    """The embedding layer's. What a trunk has after its last block, such as attention pooling, has this number too."""


def layers_of(trunk: nn.Module, name: str, *, coarse: bool, setting: str) -> Layers:
    """Number the layers of a trunk.

    Args:
        trunk: as `build_backbone` makes it, perhaps with adapters.
        name: of the backbone, as in the configuration.
        coarse: number the stages of a network that has stages, instead of their blocks.
        setting: that needs them, for messages.

    Raises:
        ValueError: the order of the network's layers is not known.
    """
    prefix, network = _network_in(trunk)
    matcher = _matcher(network, name, coarse=coarse)
    if matcher is None:
        raise ValueError(
            f"expected {setting} null with {name}, of which it is not known which layer comes first, got a value; "
            f"remove {setting}, or take a network of timm's that says so, such as timm/vit_small_patch16_224, "
            "timm/convnext_tiny or timm/resnet50"
        )
    own = {parameter: parameter.removeprefix(prefix) for parameter, _ in trunk.named_parameters()}
    named: Any = _Named([*own.values(), _EMBEDDING])
    number: dict[str, int] = group_parameters(named, matcher, reverse=True)
    return Layers({parameter: number[name] for parameter, name in own.items()}, number[_EMBEDDING])


def freeze_stages_(trunk: nn.Module, name: str, num_stages: int) -> None:
    """Mark the stem and the first `num_stages` stages, or blocks where a network has no stages, as not trained.

    Raises:
        ValueError: the network has fewer, or their order is not known.
    """
    setting = "backbone.frozen_stages"
    layers = layers_of(trunk, name, coarse=True, setting=setting)
    most = layers.embedding - 1
    if num_stages > most:
        raise ValueError(
            f"expected {setting} of at most {most} for {name}, which has {most} after its stem, got {num_stages}; "
            "lower it"
        )
    for parameter, value in trunk.named_parameters():
        if layers.number[parameter] <= num_stages:
            value.requires_grad_(False)


def parameter_groups(
    trunk: nn.Module,
    embedding: Sequence[nn.Module],
    name: str,
    *,
    layer_decay: float | None,
    decays_matrices_only: bool,
) -> list[ParameterGroup]:
    """Group the trained parameters by their settings: those of the trunk from the stem on, then the embedding layer.

    Without either setting there are two groups, trunk and embedding layer. Parameters keep the order of their
    registration.

    Args:
        trunk: of a backbone.
        embedding: its embedding layer, and what is trained with it.
        name: of the backbone, as in the configuration.
        layer_decay: d; None gives every layer the same learning rate.
        decays_matrices_only: no weight decay for biases, norms and embeddings.

    Raises:
        ValueError: the order of the network's layers is not known.
    """
    setting = "optimizer.layer_decay"
    layers = None if layer_decay is None else layers_of(trunk, name, coarse=False, setting=setting)
    prefix, network = _network_in(trunk)
    exempt = _without_weight_decay(network)
    found: dict[tuple[bool, float, bool], list[nn.Parameter]] = {}
    for module, is_embedding in ((trunk, False), *((module, True) for module in embedding)):
        for parameter, value in module.named_parameters():
            if not value.requires_grad:
                continue
            factor = 1.0
            if layers is not None and layer_decay is not None and not is_embedding:
                factor = layer_decay ** (layers.embedding - layers.number[parameter])
            own = parameter.removeprefix(prefix)
            is_exempt = value.ndim <= 1 or (not is_embedding and any(fnmatch(own, pattern) for pattern in exempt))
            decays = not (decays_matrices_only and is_exempt)
            found.setdefault((is_embedding, factor, decays), []).append(value)
    found = found or {(True, 1.0, True): []}  # a baseline without parameters
    order = sorted(found, key=lambda key: (key[0], key[1], not key[2]))
    return [ParameterGroup(found[key], *key) for key in order]


class _Named:
    """Parameters by name, as timm asks a module for them."""

    def __init__(self, names: list[str]) -> None:
        self._names = names

    def named_parameters(self) -> Iterator[tuple[str, None]]:
        return ((name, None) for name in self._names)


def _network_in(trunk: nn.Module) -> tuple[str, nn.Module]:
    """The library's network in a trunk that uses a part of it, and the prefix of its parameters' names."""
    prefix, network = "", trunk
    while not hasattr(network, "group_matcher") and isinstance(inner := getattr(network, "model", None), nn.Module):
        prefix, network = f"{prefix}model.", inner
    return prefix, network


def _without_weight_decay(network: Any) -> Iterable[str]:
    """Patterns of the names of embeddings and scales with more than one dimension."""
    if hasattr(network, "no_weight_decay"):
        return sorted(network.no_weight_decay())
    return () if hasattr(network, "group_matcher") else _NOT_IN_TIMM


def _matcher(network: Any, name: str, *, coarse: bool) -> Matcher | None:
    """How the network's layers follow each other; None where that is not known."""
    family, _, model = name.partition("/")
    if family == "timm":
        if not hasattr(network, "group_matcher"):
            return None
        try:
            found: Matcher = network.group_matcher(coarse=coarse)
        except NotImplementedError:  # of some, stages are not known
            return None
        return found
    if name == "small_cnn":  # convolutions and residual blocks in a row; the first is the stem
        return {"layers": r"^(\d+)\."}
    if name == "bn_inception":
        return _bn_inception_stages if coarse else _bn_inception_blocks
    if name.startswith("iresnet"):
        stages = r"^layer(\d)\." if coarse else r"^layer(\d)\.(\d+)\."
        return {"stem": r"^(?:conv1|bn1|prelu)\.", "blocks": [(stages, None), (r"^bn2\.", (_WITH_PREVIOUS,))]}
    if family != "torchvision":
        return None
    if re.match(r"(wide_)?resne(x)?t\d", model):
        return {"stem": r"^(?:conv1|bn1)\.", "blocks": r"^layer(\d+)\." if coarse else r"^layer(\d+)\.(\d+)\."}
    if model.startswith("vit_"):
        stem = r"^(?:conv_proj\.|class_token|encoder\.pos_embedding)"
        blocks = [(r"^encoder\.layers\.encoder_layer_(\d+)\.", None), (r"^encoder\.ln\.", (_WITH_PREVIOUS,))]
        return {"stem": stem, "blocks": blocks}
    if model.startswith("regnet_"):
        blocks_only = r"^trunk_output\.block(\d+)\." + ("" if coarse else r"block\d+-(\d+)\.")
        return {"stem": r"^stem\.", "blocks": blocks_only}
    if model.startswith(("convnext_", "swin_")):
        return _torchvision_stages if coarse else _torchvision_blocks
    if model.startswith(("efficientnet_", "mobilenet_")):
        return {"layers": r"^features\.(\d+)\."}
    return None


def _bn_inception_blocks(name: str) -> tuple[float, ...]:
    block = re.match(r"inception_(\d)([a-e])", name)
    if block is None:
        return (0.0,) if name.startswith("conv") else (float("inf"),)
    return 1.0, float(block[1]), float(ord(block[2]))


def _bn_inception_stages(name: str) -> tuple[float, ...]:
    return _bn_inception_blocks(name)[:2]


def _torchvision_blocks(name: str) -> tuple[float, ...]:
    """Swin and ConvNeXt: features 0 is the stem, then stages and what makes the map smaller for the next take turns."""
    part = re.match(r"features\.(\d+)\.(\w+)\.", name)
    if part is None:
        return (1.0, float(_WITH_PREVIOUS)) if name.startswith("norm.") else (float("inf"),)
    if part[1] == "0":
        return (0.0,)
    stage, is_stage = int(part[1]) // 2 + 1, int(part[1]) % 2 == 1
    return 1.0, float(stage), float(part[2]) if is_stage else 0.0


def _torchvision_stages(name: str) -> tuple[float, ...]:
    return _torchvision_blocks(name)[:2]
