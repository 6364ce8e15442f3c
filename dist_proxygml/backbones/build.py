"""From images to embeddings: preprocessing -> trunk -> pooling -> (LayerNorm) -> linear embedding -> unit length.

    uint8 RGB [b, 3, H, W] -> float32 [b, D], rows of length 1

`build_backbone` knows timm and torchvision models by name, BN-Inception (the published one), the
IResNets of ArcFace, a small CNN for small images, and raw pixels as a baseline without parameters.

Chosen: preprocessing belongs to the model, so that weights cannot be separated from the mean, range
and colour order they were trained with, and images are transferred as bytes. Its constants are Python
numbers and its arithmetic is float32 whatever the trunk's type: as buffers they would be rounded
when the model is cast to bfloat16 (0.485 to 0.4844). The trunk computes in the type of its
parameters.
With `pool` 1 a library's model gives the very features that its classifier saw. A larger grid, or a
cut at an earlier layer, gives a feature map averaged to pool x pool cells, as small centred images
need. Generalised-mean pooling is for feature maps: tokens of a transformer end in a LayerNorm, half
of them are negative, and the generalised mean is of what is positive; timm's own `global_pool` pools
tokens, and a map of a block's output (`out_indices`) can be pooled either way.
Declined: features of several scales side by side.

Initialisation draws from torch's global generator and depends on nothing else: seed it alike on all
ranks.
"""

import contextlib
import difflib
import inspect
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models import feature_extraction

from dist_proxygml.backbones.batch_norm import GlobalBatchNorm, convert_batch_norm
from dist_proxygml.backbones.bn_inception import BNInception
from dist_proxygml.backbones.from_weights import IMAGENET, read_timm_source, resolve_backbone, weight_source
from dist_proxygml.backbones.gradient_checkpointing import BlockSwitch, Switch, find_blocks, saved_bytes
from dist_proxygml.backbones.iresnet import SIDE, IResNet, depths
from dist_proxygml.backbones.layers import freeze_stages_
from dist_proxygml.backbones.pretrained import efficientnet_lite0_weights, load_weights, read_weight_file
from dist_proxygml.backbones.small_cnn import SmallCnn
from dist_proxygml.config import BackboneConfig


class Preprocessing(NamedTuple):
    """Input normalisation of a network: (pixel * value_range / 255 - mean) / std per channel."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    value_range: float = 1.0  # largest value: 1 or 255
    order: str = "RGB"  # of the channels, and so of mean and std

    def apply(self, images: UInt8[Tensor, "b 3 H W"], *, channels_last: bool = False) -> Float[Tensor, "b 3 H W"]:
        """Return the network's input in float32, stored as NHWC if `channels_last`."""
        channels = [
            (images[:, "RGB".index(colour)].float() / (255.0 / self.value_range) - mean) / std
            for colour, mean, std in zip(self.order, self.mean, self.std, strict=True)
        ]
        if channels_last:
            return torch.stack(channels, dim=-1).permute(0, 3, 1, 2)
        return torch.stack(channels, dim=1)


class GeneralizedMean(nn.Module):
    """Generalised-mean pooling: (mean of max(x, eps)^p over a cell)^(1/p), with one learned p for all channels.

    p = 1 is average pooling, a large p nears the maximum; p starts at 3. Arithmetic is float32 at least. Source:
    Radenovic, Tolias, Chum 2018, "Fine-tuning CNN Image Retrieval with No Human Annotation", equation 3.
    """

    def __init__(self, pool: int = 1, *, p: float = 3.0, eps: float = 1e-6) -> None:
        super().__init__()
        self.pool = pool
        self.p = nn.Parameter(torch.tensor([p]))
        self.eps = eps

    def forward(self, maps: Float[Tensor, "b F h w"]) -> Float[Tensor, "b F pool pool"]:
        """Pool maps to pool x pool cells."""
        wide = torch.promote_types(maps.dtype, torch.float32)
        p = self.p.to(wide)
        cells: Tensor = F.adaptive_avg_pool2d(maps.to(wide).clamp(min=self.eps).pow(p), self.pool)
        return cells.pow(1 / p).to(maps.dtype)


class CompiledTrunk(NamedTuple):
    """A trunk's forward pass as torch.compile gives it, for one size of batch."""

    run: Callable[[Tensor], Any]
    batch_size: int


class EmbeddingModel(nn.Module):
    """A trunk with an L2-normalised linear embedding: uint8 RGB [b, 3, H, W] -> float32 [b, D].

    `trunk` maps normalised images to a map [b, F, h, w], pooled here to `pool` x `pool` cells by
    averages or by the module `pooling`, or to vectors [b, F]. `embedding` is the last layer, which
    the published warm-up epoch trains alone. With `norm_features` the pooled features have mean 0
    and deviation 1 before it: LayerNorm without scale and offset (Zhai and Wu 2019, "Classification
    is a Strong Baseline for Deep Metric Learning"), which the embedding layer would only repeat.

    With `frozen_batch_norm` the BatchNorm layers stay in evaluation mode when the model trains:
    their running statistics are used and kept as they are, while scale and offset are still
    trained. That is what the published recipe does. A BatchNorm layer whose scale and offset are not
    trained, as in frozen stages, stays in evaluation mode anyway.
    """

    keeps_lengths = False
    """Whether embeddings keep their lengths in training, for a loss that goes by them."""
    adapter_scale: float | None = None
    """What the trunk's adapters are multiplied by; None: it has none."""

    def __init__(
        self,
        trunk: nn.Module,
        *,
        embedding: nn.Module,
        preprocessing: Preprocessing,
        pool: int = 1,
        pooling: GeneralizedMean | None = None,
        norm_features: bool = False,
        frozen_batch_norm: bool = False,
        channels_last: bool = False,
        checkpointing: Switch | None = None,
    ) -> None:
        super().__init__()
        self.checkpointing = checkpointing  # on while it trains
        self._compiled: CompiledTrunk | None = None
        self.preprocessing = preprocessing
        self.trunk = trunk
        self.pool = pool
        self.pooling = pooling
        self.norm_features = norm_features
        self.embedding = embedding
        self.frozen_batch_norm = frozen_batch_norm
        # For images only: DeepSpeed broadcasts weights as bytes, which must be contiguous.
        self.channels_last = channels_last
        self.train(self.training)

    def forward(self, images: UInt8[Tensor, "b 3 H W"]) -> Float[Tensor, "b D"]:
        """Compute embeddings, unit rows in float32, or in float64 if the embedding layer is; in training with
        `keeps_lengths` as they come.

        Raises:
            ValueError: the images are not uint8 [b, 3, H, W].
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"expected uint8 RGB images [b, 3, H, W], got {images.dtype} {list(images.shape)}; "
                "pass pixels as they are, the model normalises them"
            )
        pixels = self.preprocessing.apply(images, channels_last=self.channels_last)
        run: Callable[[Tensor], Any] = self.trunk
        if self.training and self._compiled is not None and len(images) == self._compiled.batch_size:
            run = self._compiled.run
        features = _flat_features(run(pixels.to(_dtype_of(self.trunk))), self.pool, self.pooling)
        if self.norm_features:
            wide = torch.promote_types(features.dtype, torch.float32)
            features = F.layer_norm(features.to(wide), features.shape[1:])
        embeddings_bD = self.embedding(features.to(_dtype_of(self.embedding)))
        wide = torch.promote_types(embeddings_bD.dtype, torch.float32)  # float64 stays what it is
        if self.training and self.keeps_lengths:
            return embeddings_bD.to(wide)
        return F.normalize(embeddings_bD.to(wide), dim=1)

    def train(self, mode: bool = True) -> Self:
        """Set training or evaluation mode; frozen BatchNorm layers stay in evaluation mode."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, _BatchNorm) and (self.frozen_batch_norm or _is_frozen(module)):
                module.eval()
        if self.checkpointing is not None:
            self.checkpointing(mode)
        return self

    def compile_trunk(self, batch_size: int) -> None:
        """Let torch.compile run the trunk when it trains on so many images; names of parameters stay.

        A shorter batch, as a rank's last of an epoch may be, runs as before instead of being compiled once more, and so
        does an evaluation. BatchNorm over several ranks, or with gradient checkpointing, stays outside of what is
        compiled.
        """
        if self.checkpointing is not None:
            for module in self.modules():
                if isinstance(module, GlobalBatchNorm):
                    module.is_compiled = False
        self._compiled = CompiledTrunk(torch.compile(self._run_trunk, dynamic=False), batch_size)

    def _run_trunk(self, pixels: Tensor) -> Any:
        return self.trunk(pixels)


class RawPixels(EmbeddingModel):
    """Baseline without parameters: 32 x 32 pixels minus the image's mean, unit length; D 3072."""

    def __init__(self) -> None:
        super().__init__(
            RawPixelsTrunk(),
            embedding=nn.Identity(),
            preprocessing=Preprocessing((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), value_range=255.0),
        )


class RawPixelsTrunk(nn.Module):
    """Each image area-averaged to 32 x 32, minus its mean over pixels and channels, as a vector."""

    side = 32
    num_features = 3 * side * side

    def forward(self, pixels: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b 3072"]:
        """Return centred pixels; the cosine between them is the correlation of the images."""
        small = F.interpolate(pixels, size=(self.side, self.side), mode="area").flatten(1)
        return small - small.mean(dim=1, keepdim=True)


# ---- building by name ----------------------------------------------------------------------------


class Trunk(NamedTuple):
    """A trunk and the facts needed to use it."""

    module: nn.Module
    preprocessing: Preprocessing
    image_size: int  # an image side that the trunk accepts; arbitrary where the architecture does not fix one
    embedding: nn.Module | None = None  # the network's own; None: a linear layer is to be made
    checkpointing: Switch | None = None  # None: it cannot


def build_backbone(
    config: BackboneConfig, *, load_pretrained: bool = True, group: dist.ProcessGroup | None = None
) -> EmbeddingModel:
    """Build the embedding model that `config` names, in training mode.

    Names: `bn_inception`, `small_cnn`, `raw_pixels`, `iresnet18`, 34, 50, 100 and 200, `timm/NAME` and
    `torchvision/NAME` (classification models). NAME of timm may be `hf-hub:ORG/NAME` on the Hugging Face Hub or
    `local-dir:FOLDER` with its config.json. Options:

    - small_cnn: `width`, `strides`, `residual_blocks`.
    - iresnet: `dropout` before the embedding layer, 0.
    - timm: those of timm.create_model, and `out_indices` with one index to cut the trunk early, as
      timm counts feature maps: for most CNNs 0 to 4 at strides 2 to 32, for transformers blocks.
      `img_size` builds a transformer for another size of images and resamples its position embeddings;
      `global_pool` says how it pools its tokens: "token", "avg", "max", "avgmax", "map".
    - torchvision: those of the model's own function, and `return_node` with a node of its graph to
      cut there, say "layer3" of a resnet; the node must give a map [b, F, h, w].

    `pretrained`: path of a weight file, loaded by strict names except for its classifier, of
    any size, which the embedding layer replaces, and of the fc and features of an IResNet for
    another embedding_dim; "package" for the ImageNet weights that a Python package ships
    (timm/tf_efficientnet_lite0 only); "timm" or "torchvision" for the library's own download, with
    a Hub's name or a folder what is there; "hf-hub:ORG/NAME" or "local-dir:FOLDER".

    The stages of `frozen_stages` are not trained; adapters (`lora`) are for training alone, which adds them (lora.py).
    BatchNorm layers take their statistics over the ranks of `group` (batch_norm.py). With `load_pretrained` False the
    model is the same, preprocessing included, but its weights stay random: for loading a checkpoint over them where the
    original weights are not at hand.

    Raises:
        ValueError: the name (with the nearest suggested) or an option is unknown, weights are missing
            or do not fit, or settings contradict each other.
    """
    config = resolve_backbone(config)
    if config.name == "raw_pixels":
        return _build_raw_pixels(config)
    trunk = _build_trunk(config, load_pretrained=load_pretrained)
    convert_batch_norm(trunk.module, group)
    num_features = _count_features(trunk, config=config)
    if config.gradient_checkpointing:
        _check_checkpointing(trunk, config)
    if config.frozen_stages is not None:
        freeze_stages_(trunk.module, config.name, config.frozen_stages)
    if trunk.embedding is not None:
        convert_batch_norm(trunk.embedding, group)
    preprocessing = trunk.preprocessing
    if config.mean is not None and config.std is not None:
        if preprocessing.order != "RGB":
            raise ValueError(
                f"expected backbone.mean and std null for {config.name}, whose weights expect colours from 0 to 255 "
                f"as {preprocessing.order}, got {list(config.mean)} and {list(config.std)}; remove them"
            )
        preprocessing = Preprocessing(config.mean, config.std)
    return EmbeddingModel(
        trunk.module,
        embedding=trunk.embedding or nn.Linear(num_features, config.embedding_dim),
        preprocessing=preprocessing,
        pool=config.pool,
        pooling=GeneralizedMean(config.pool) if config.pooling == "gem" else None,
        norm_features=config.embedding_norm == "layer_norm",
        frozen_batch_norm=config.batch_norm == "frozen",
        channels_last=config.channels_last,
        checkpointing=trunk.checkpointing if config.gradient_checkpointing else None,
    )


def _build_trunk(config: BackboneConfig, *, load_pretrained: bool) -> Trunk:
    family, slash, name = config.name.partition("/")
    if family != "timm" and weight_source(config.pretrained or ""):
        raise ValueError(
            f"backbone.pretrained {config.pretrained!r} does not fit backbone.name {config.name!r}: only timm's "
            "networks lie there; use timm/NAME, the path of a weight file, or null"
        )
    if family in ("timm", "torchvision") and not name:
        raise ValueError(f"expected a model name after the slash, got {config.name!r}; say {family}/resnet50")
    if config.pretrained in ("timm", "torchvision") and config.pretrained != family:
        raise ValueError(
            f"backbone.pretrained {config.pretrained!r} does not fit backbone.name "
            f"{config.name!r}; use {config.pretrained}/NAME, the path of a weight file, or null"
        )
    if config.pretrained == "package" and config.name != "timm/tf_efficientnet_lite0":
        raise ValueError(
            'backbone.pretrained "package" exists for timm/tf_efficientnet_lite0 only, got '
            f"{config.name!r}; use that name, the path of a weight file, or null"
        )
    if family == "timm" and slash:
        return _build_timm(name, config=config, load_pretrained=load_pretrained)
    if family == "torchvision" and slash:
        return _build_torchvision(name, config=config, load_pretrained=load_pretrained)
    if config.name in depths():
        return _build_iresnet(config, load_pretrained=load_pretrained)
    if config.name == "bn_inception":
        _refuse_unknown_options(config, known=())
        network = BNInception()
        trunk = Trunk(
            network,
            Preprocessing((104.0, 117.0, 128.0), (1.0, 1.0, 1.0), value_range=255.0, order="BGR"),
            image_size=224,
            checkpointing=network.set_grad_checkpointing,
        )
    elif config.name == "small_cnn":
        _refuse_unknown_options(config, known=inspect.signature(SmallCnn).parameters)
        small = SmallCnn(**config.options)
        trunk = Trunk(
            small,
            # Roughly the statistics of drawings on white; BatchNorm corrects the rest.
            Preprocessing((0.7, 0.7, 0.7), (0.3, 0.3, 0.3)),
            image_size=64,
            checkpointing=BlockSwitch(find_blocks(small)) if config.gradient_checkpointing else None,
        )
    else:
        own = ["bn_inception", "small_cnn", "raw_pixels", *depths()]
        known = own + [f"timm/{n}" for n in timm.list_models()]
        known += [f"torchvision/{n}" for n in _torchvision_names()]
        raise ValueError(
            f"unknown backbone {config.name!r}; did you mean {_nearest(config.name, known)}? "
            f"expected {', '.join(own)}, timm/NAME or torchvision/NAME"
        )
    if config.pretrained is not None and load_pretrained:
        _load_file(trunk.module, config, classifiers=["last_linear"])
    return trunk


def _build_iresnet(config: BackboneConfig, *, load_pretrained: bool) -> Trunk:
    _refuse_unknown_options(config, known=["dropout"])
    network = IResNet(depths()[config.name], config.embedding_dim, **config.options)
    if config.pretrained is not None and load_pretrained:
        weights, classifiers = read_weight_file(Path(config.pretrained)), ["fc", "features"]
        source = f"weight file {config.pretrained}"
        if "fc.weight" in weights and len(weights["fc.weight"]) == config.embedding_dim:
            load_weights(network, weights, classifiers=[], source=source)
            embedding = network.split_embedding()
        else:  # as a classifier, of any size
            embedding = network.split_embedding()
            load_weights(network, weights, classifiers=classifiers, source=source)
    else:
        embedding = network.split_embedding()
    return Trunk(
        network,
        Preprocessing((0.5,) * 3, (0.5,) * 3),
        image_size=SIDE,
        checkpointing=BlockSwitch(find_blocks(network)) if config.gradient_checkpointing else None,
        embedding=embedding,
    )


def _build_raw_pixels(config: BackboneConfig) -> RawPixels:
    _refuse_unknown_options(config, known=())
    expected: dict[str, Any] = {"embedding_dim": RawPixelsTrunk.num_features, "pool": 1, "pretrained": None}
    expected |= {"mean": None, "std": None, "pooling": "average", "embedding_norm": None}
    expected |= {"frozen_stages": None, "lora": None}
    expected |= {"gradient_checkpointing": False}
    for field, value in expected.items():
        if getattr(config, field) != value:
            raise ValueError(
                f"backbone.{field} must be {value} for raw_pixels, which has no layers, got {getattr(config, field)!r}"
            )
    return RawPixels()


# ---- timm ----------------------------------------------------------------------------------------


class TimmFeatureMap(nn.Module):
    """An intermediate feature map [b, F, h, w] of a timm model, without the later layers."""

    def __init__(self, model: Any, index: int) -> None:
        super().__init__()
        model.prune_intermediate_layers([index], prune_norm=True, prune_head=True)
        self.model = model
        self.index = index

    def forward(self, pixels: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b F h w"]:
        """The map."""
        maps: list[Tensor] = self.model.forward_intermediates(
            pixels, indices=[self.index], stop_early=True, intermediates_only=True
        )
        return maps[0]


class ChannelsFirst(nn.Module):
    """Permute the maps of a trunk from [b, h, w, F] to [b, F, h, w]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b F h w"]:
        """The map."""
        feature_map: Tensor = self.model(pixels)
        return feature_map.permute(0, 3, 1, 2)


def _build_timm(name: str, *, config: BackboneConfig, load_pretrained: bool) -> Trunk:
    # 1. The model without its classifier.
    if not timm.is_model(name):
        known = [f"timm/{n}" for n in timm.list_models()]
        raise ValueError(f"unknown backbone {config.name!r}; did you mean {_nearest(config.name, known)}?")
    options = dict(config.options)
    index = _single_index(options.pop("out_indices")) if "out_indices" in options else None
    pooling: dict[str, Any] = {}  # as the library does it for its classifier
    owned = {
        "pretrained": "set backbone.pretrained instead",
        "checkpoint_path": "set backbone.pretrained to the path of a weight file",
        "num_classes": "the embedding layer replaces the classifier",
        "features_only": '"out_indices" alone cuts the trunk',
        "in_chans": "images have three channels",
    }
    is_map = index is None and (config.pool > 1 or config.pooling == "gem")  # which is pooled here
    if is_map:
        owned["global_pool"] = f"backbone.pool {config.pool} and backbone.pooling {config.pooling!r} say how to pool"
        pooling = {"global_pool": ""}  # no pooling: the map itself
    for key, why in owned.items():
        if key in options:
            raise ValueError(f"backbone.options.{key} is not for {config.name}: remove it, {why}")
    source = weight_source(config.pretrained or "")
    download = load_pretrained and (config.pretrained == "timm" or source is not None)
    if download:
        _refuse_new_layers(name, options, source)
    try:
        found = source if source and download else name
        model: Any = timm.create_model(found, pretrained=download, num_classes=0, **pooling, **options)
    except TypeError as error:  # the model's constructor, a plain function, defines its options
        raise ValueError(f"timm does not accept backbone.options {options} for {name}: {error}") from None
    except Exception as error:  # networks, hubs and caches raise many types
        if not download:
            raise
        raise ValueError(_offline_remedy("timm", name, error)) from error

    # 2. Weights and the preprocessing that goes with them.
    description = model.pretrained_cfg
    preprocessing = Preprocessing(tuple(description["mean"]), tuple(description["std"]))  # unless it is configured
    classifiers = description.get("classifier") or ()
    classifiers = [classifiers] if isinstance(classifiers, str) else list(classifiers)
    if config.pretrained == "package":
        preprocessing = Preprocessing((127.0,) * 3, (128.0,) * 3, value_range=255.0)
        if load_pretrained:
            weights = efficientnet_lite0_weights(model)
            load_weights(model, weights, classifiers=classifiers, source="the installed package")
    elif config.pretrained not in (None, "timm") and source is None and load_pretrained:
        _load_file(model, config, classifiers=classifiers)

    # 3. The part that is used.
    trunk: nn.Module = model
    if index is not None:
        try:
            trunk = TimmFeatureMap(model, index)
        except (AttributeError, AssertionError, IndexError, ValueError) as error:
            raise ValueError(
                f"timm cannot cut {name} at backbone.options.out_indices [{index}] "
                f"({str(error).strip() or type(error).__name__}); use another index or leave it out"
            ) from None
    elif is_map and getattr(model, "output_fmt", "NCHW") == "NHWC":
        trunk = ChannelsFirst(model)
    size = options.get("img_size", description["input_size"][-1])
    return Trunk(
        trunk,
        preprocessing,
        image_size=size if isinstance(size, int) else size[-1],
        checkpointing=getattr(model, "set_grad_checkpointing", None),
    )


def _refuse_new_layers(name: str, options: dict[str, Any], source: str | None) -> None:
    """Refuse options that give a network layers which its weights do not have: timm would leave them as they are.

    An attention pooling (`global_pool` "map") is an exception: it is meant to be learned.
    """
    of_weights = {} if source is None else read_timm_source(source).options
    if all(of_weights.get(key, ...) == value for key, value in options.items()):
        return
    try:
        with torch.device("meta"):
            wanted, stored = (
                {key for key, _ in timm.create_model(name, num_classes=0, **given).named_parameters()}
                for given in (options, of_weights)
            )
    except Exception:  # who builds it for good explains
        return
    missing = sorted(key for key in wanted - stored if not key.startswith("attn_pool."))
    if missing:
        has_norm = all(key.startswith("fc_norm.") for key in missing)
        remedy = 'add "fc_norm": false to them, the norm before pooling' if has_norm else "change them"
        raise ValueError(
            f"expected backbone.options whose layers the weights of {name} have, got {options}, with which "
            f"{', '.join(missing[:3])} would stay random; {remedy}"
        )


def can_fetch_weights(name: str) -> bool:
    """Whether the weights that timm has for a network are in its cache, or its hub answers for them within seconds;
    those of a folder are there.
    """
    source = weight_source(name)
    if source is not None and source.startswith("local-dir:"):
        return Path(source.partition(":")[2]).is_dir()
    hub_id = getattr(timm.get_pretrained_cfg(name), "hf_hub_id", None) if timm.is_model(name) else None
    if source is not None:
        hub_id = source.partition(":")[2]
    if hub_id is None:
        return False
    if isinstance(try_to_load_from_cache(hub_id, "model.safetensors"), str):
        return True
    try:
        get_hf_file_metadata(hf_hub_url(hub_id, "model.safetensors"), timeout=5)
    except Exception:  # networks and hubs raise many types
        return False
    return True


def _single_index(value: Any) -> int:
    if isinstance(value, list) and len(value) == 1 and type(value[0]) is int:
        return value[0]
    raise ValueError(f"backbone.options.out_indices must be a list of one integer, got {value!r}; say [3]")


# ---- torchvision ---------------------------------------------------------------------------------


class TorchvisionFeatureMap(nn.Module):
    """The output [b, F, h, w] of one node of a torchvision model, without the later layers."""

    def __init__(self, model: nn.Module, node: str, *, whole: Sequence[type[nn.Module]] = ()) -> None:
        """Cut a model; modules of the types `whole` stay what they are, and the node is none of theirs."""
        super().__init__()
        tracer = {"leaf_modules": list(whole)} if whole else None
        self.model = feature_extraction.create_feature_extractor(model, [node], tracer_kwargs=tracer)
        self.node = node

    def forward(self, pixels: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b F h w"]:
        """The map."""
        feature_map: Tensor = self.model(pixels)[self.node]
        return feature_map


def _build_torchvision(name: str, *, config: BackboneConfig, load_pretrained: bool) -> Trunk:
    # 1. The model.
    if name not in _torchvision_names():
        known = [f"torchvision/{n}" for n in _torchvision_names()]
        raise ValueError(f"unknown backbone {config.name!r}; did you mean {_nearest(config.name, known)}?")
    options = dict(config.options)
    node = options.pop("return_node", None)
    download = config.pretrained == "torchvision" and load_pretrained
    weights = torchvision.models.get_model_weights(name).DEFAULT if download else None
    try:
        model = torchvision.models.get_model(name, weights=weights, **options)
    except TypeError as error:
        raise ValueError(f"torchvision does not accept backbone.options {options} for {name}: {error}") from None
    except OSError as error:
        if not download:
            raise
        raise ValueError(_offline_remedy("torchvision", name, error)) from error
    if getattr(model, "aux_logits", False):
        raise ValueError(
            f"{config.name} has auxiliary classifiers, which an embedding has no use for; "
            'add "aux_logits": false to backbone.options'
        )

    # 2. Remove its classifier, the last linear layer.
    linear_layers = [n for n, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    if not linear_layers:
        raise ValueError(f"{config.name} does not end in a linear classifier; choose another model")
    classifier = linear_layers[-1]
    parent, _, child = classifier.rpartition(".")
    setattr(model.get_submodule(parent), child, nn.Identity())
    if config.pretrained not in (None, "torchvision") and load_pretrained:
        _load_file(model, config, classifiers=[classifier])

    # 3. The part that is used.
    trunk: nn.Module = model
    blocks = find_blocks(model) if config.gradient_checkpointing else []
    if node is not None:
        try:
            trunk = TorchvisionFeatureMap(model, node, whole=list({type(block) for block in blocks}))
        except ValueError:
            nodes = feature_extraction.get_graph_node_names(model)[1]
            inside = " With backbone.gradient_checkpointing it must not lie inside a block." if node in nodes else ""
            raise ValueError(
                f"{config.name} has no node {node!r} (backbone.options.return_node); did you mean "
                f"{_nearest(str(node), nodes)}?{inside}"
            ) from None
    return Trunk(
        trunk,
        Preprocessing(*IMAGENET),
        image_size=options.get("image_size", 224),
        checkpointing=BlockSwitch(blocks) if blocks else None,
    )


def _torchvision_names() -> list[str]:
    names: list[str] = torchvision.models.list_models(module=torchvision.models)
    return names


# ---- shared --------------------------------------------------------------------------------------


def _flat_features(features: Tensor, pool: int, pooling: nn.Module | None = None) -> Tensor:
    """Pool [b, F, h, w] to pool x pool cells, by averages without `pooling`, and flatten; return [b, F] unchanged."""
    if features.ndim == 4:
        features = F.adaptive_avg_pool2d(features, pool) if pooling is None else pooling(features)
    return features.flatten(1)


def _count_features(trunk: Trunk, *, config: BackboneConfig) -> int:
    """Return the length of the trunk's pooled features, from a forward pass on meta tensors."""
    trunk.module.eval()
    features = on_meta(trunk.module, torch.empty(1, 3, trunk.image_size, trunk.image_size, device="meta"))
    trunk.module.train()
    if features.ndim != 4 and (config.pool > 1 or config.pooling == "gem" or features.ndim != 2):
        is_timm = config.name.startswith("timm/")
        cut = '"out_indices": [3]' if is_timm else '"return_node": "layer4" for a resnet'
        raise ValueError(
            f"backbone.pool {config.pool} with pooling {config.pooling!r} needs a feature map [b, F, h, w], but "
            f'{config.name} gives {list(features.shape)}; set pool to 1 and pooling to "average", or name a layer that '
            f"gives a map in backbone.options, say {cut}"
        )
    return _flat_features(features, config.pool).shape[1]


def _check_checkpointing(trunk: Trunk, config: BackboneConfig) -> None:
    """Refuse a trunk without blocks to checkpoint, or that runs without checkpointing them."""
    message = (
        f"expected a backbone with blocks whose activations can be computed again, got {config.name}"
        f"{f' with {config.options}' if config.options else ''}, which has none; set "
        "backbone.gradient_checkpointing to false, or choose another network"
    )
    if trunk.checkpointing is None:
        raise ValueError(message)
    images = torch.empty(1, 3, trunk.image_size, trunk.image_size, device="meta")
    trunk.module.eval()
    try:
        plain = saved_bytes(lambda: _meta_output(trunk.module, images))
        trunk.checkpointing(True)
        reduced = saved_bytes(lambda: _meta_output(trunk.module, images))
    except Exception as error:  # networks say in many ways that they cannot
        raise ValueError(f"{message} ({type(error).__name__}: {error})") from None
    finally:
        with contextlib.suppress(Exception):
            trunk.checkpointing(False)
        trunk.module.train()
    if reduced >= plain:
        raise ValueError(message)


@torch.no_grad()
def on_meta(module: nn.Module, images: Tensor) -> Any:
    """Run a module on images on the meta device, where tensors have shapes only."""
    return _meta_output(module, images)


def _meta_output(module: nn.Module, images: Tensor) -> Any:
    """Run a module on images on the meta device, where tensors have shapes only."""
    named = [*module.named_parameters(), *module.named_buffers()]
    shapes_only = {
        name: torch.empty_like(tensor, device="meta", requires_grad=torch.is_grad_enabled() and tensor.requires_grad)
        for name, tensor in named
    }
    return torch.func.functional_call(module, shapes_only, (images,))


def _is_frozen(module: _BatchNorm) -> bool:
    """Whether it has a scale and an offset, and neither is trained."""
    own = list(module.parameters(recurse=False))
    return bool(own) and not any(parameter.requires_grad for parameter in own)


def _dtype_of(module: nn.Module) -> torch.dtype:
    return next((parameter.dtype for parameter in module.parameters()), torch.float32)


def _load_file(module: nn.Module, config: BackboneConfig, *, classifiers: list[str]) -> None:
    assert config.pretrained is not None
    weights = read_weight_file(Path(config.pretrained))
    adapt: Any = getattr(sys.modules[type(module).__module__], "checkpoint_filter_fn", None)
    if adapt is not None and config.name.startswith("timm/"):
        # What timm does with weights of its own: names of other libraries, position embeddings of another size.
        with contextlib.suppress(Exception):  # what is left as it is does not fit, and is explained below
            weights = dict(adapt(dict(weights), module))
    load_weights(module, weights, classifiers=classifiers, source=f"weight file {config.pretrained}")


def _refuse_unknown_options(config: BackboneConfig, *, known: Iterable[str]) -> None:
    known = list(known)
    for key in config.options:
        if key not in known:
            hint = f"did you mean {_nearest(key, known)}?" if known else f"{config.name} has none"
            raise ValueError(f"unknown option backbone.options.{key} of {config.name}; {hint}")


def _nearest(name: str, known: Iterable[str]) -> str:
    return " or ".join(difflib.get_close_matches(name, list(known), n=3, cutoff=0.0))


def _offline_remedy(library: str, name: str, error: Exception) -> str:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return (
        f"{library} could not fetch the pretrained weights of {name} ({reason}); on a machine "
        "without internet access, fetch the weight file elsewhere and set backbone.pretrained to "
        "its path"
    )
