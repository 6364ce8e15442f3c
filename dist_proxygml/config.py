"""Typed, closed configuration: JSON in, frozen objects out.

A file is one JSON object; `--set a.b=value` overrides single keys before validation. Unknown keys, wrong types and
contradictory settings are refused here, before any process group, device or data is touched. Every field has a
one-sentence description.

Declined: YAML (a second syntax for the same thing), inheritance between files (one file must describe a run), and
options through the environment.
"""

import difflib
import json
import re
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    TypeAdapter,
    ValidationError,
    model_serializer,
    model_validator,
)

from dist_proxygml.protocols import LEGACY_PROTOCOLS, PROTOCOLS, far_metric
from dist_proxygml.rules import (
    check_gallery_split,
    check_head,
    check_margin,
    check_matryoshka,
    check_ratio_or_topk,
    check_search,
    check_sparse_gradient,
)

# A byte count with a binary unit.
_BYTES = r"([0-9]+(?:\.[0-9]+)?) ?(B|KiB|MiB|GiB|TiB)"


def _checked_bytes(text: str) -> str:
    parse_bytes(text)
    return text


_ByteCount = Annotated[str, Field(pattern=f"^{_BYTES}$"), AfterValidator(_checked_bytes)]
# A part of a file name.
SplitName = Annotated[str, Field(pattern=r"^[^/\x00-\x1f]+$")]


_Count = Annotated[int, Field(ge=1)]
_Share = Annotated[float, Field(ge=0, lt=1)]
# 1 is what None stands for.
_Power = Annotated[
    Annotated[float, Field(ge=0, le=1)] | None, AfterValidator(lambda power: None if power == 1 else power)
]
# Upper limit of all settings, which leaves headroom in 64 bits.
_MAX_NUMBER = 1 << 62


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    unsaid: ClassVar[Mapping[str, Any]] = {}
    """What earlier versions did and had no setting for: a setting of this value is not written, so that runs,
    checkpoints, exports, embeddings and results of before and of now are the same to whoever compares them."""

    @model_serializer(mode="wrap")
    def _without_unsaid(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        written: dict[str, Any] = write(self)
        return {name: value for name, value in written.items() if self.unsaid.get(name, ...) != value}


# ---- images ----------------------------------------------------------------------------------------------------------


class AugmentationStep(BaseModel):
    """A transform of torchvision.transforms.v2: the name of its class, and its arguments."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, allow_inf_nan=False)

    name: str


_Side = Annotated[int, Field(ge=1, le=4096)]
_Interpolation = Literal["bilinear", "bicubic"] | None
_FROM_WEIGHTS = "null: as the weights say"


class _Square(_Section):
    """Gives squares. What is null here is filled in from the weights when a run starts (backbones/from_weights.py)."""

    @property
    def side(self) -> int:
        """`size`, once it is known.

        Raises:
            ValueError: it is null.
        """
        size: int | None = getattr(self, "size", None)
        if size is None:
            raise ValueError("expected the size of a transform, got null, which the start of a run fills in; set it")
        return size


class RandomResizedCropConfig(_Square):
    """Random crop of area `scale` and aspect ratio 3/4 to 4/3, resized to `size`; published for training."""

    unsaid: ClassVar[Mapping[str, Any]] = {"interpolation": "bilinear", "augment": []}

    name: Literal["random_resized_crop"]
    size: _Side | None = Field(224, description=f"Side of the square result, in pixels; {_FROM_WEIGHTS}.")
    scale: tuple[float, float] = Field((0.08, 1.0), description="Range of the crop's share of the image area.")
    flip: bool = Field(True, description="Mirror left-right with probability 1/2.")
    interpolation: _Interpolation = Field("bilinear", description=f"How pixels are resized; {_FROM_WEIGHTS}.")
    augment: list[AugmentationStep] = Field(
        [],
        description="Transforms of torchvision.transforms.v2 that follow, by name and with their arguments: "
        '{"name": "RandAugment", "num_ops": 2}.',
    )


class CenterCropConfig(_Square):
    """Shorter side resized to `resize`, then the central `size` x `size` square; the published test transform."""

    unsaid: ClassVar[Mapping[str, Any]] = {"interpolation": "bilinear"}

    name: Literal["center_crop"]
    resize: _Side | None = Field(
        256,
        description="Length of the shorter side after resizing, in pixels; null: size / crop_pct, as the weights say.",
    )
    size: _Side | None = Field(224, description=f"Side of the square crop, in pixels; {_FROM_WEIGHTS}.")
    interpolation: _Interpolation = Field("bilinear", description=f"How pixels are resized; {_FROM_WEIGHTS}.")


class ResizeConfig(_Square):
    """Full image resized to a square, by area averaging unless `interpolation` says otherwise."""

    unsaid: ClassVar[Mapping[str, Any]] = {"interpolation": "area"}

    name: Literal["resize"]
    size: _Side | None = Field(description=f"Side of the square result, in pixels; {_FROM_WEIGHTS}.")
    interpolation: Literal["area", "bilinear", "bicubic"] | None = Field(
        "area",
        description=f"How pixels are resized; area is exact for squares reduced by a whole number; {_FROM_WEIGHTS}.",
    )


class AffineJitterConfig(_Square):
    """Affine warp and colour jitter of full small images, computed for a batch at once.

    Each number is the half-width of a uniform range; 0 disables that part.
    """

    name: Literal["affine_jitter"]
    size: _Side | None = Field(description=f"Side of the square result, in pixels; {_FROM_WEIGHTS}.")
    degrees: float = Field(0.0, ge=0, le=360, description="Rotation, degrees.")
    log_scale: float = Field(0.0, ge=0, le=10, description="Natural logarithm of the zoom factor.")
    shift: float = Field(0.0, ge=0, le=10, description="Translation along each axis, as a share of half the side.")
    shear: float = Field(0.0, ge=0, le=10, description="Shear, and logarithm of the change of aspect ratio.")
    brightness: float = Field(0.0, ge=0, le=1, description="Factor 1 +- brightness on all values.")
    contrast: float = Field(0.0, ge=0, le=1, description="Factor 1 +- contrast about the image's mean colour.")
    saturation: float = Field(0.0, ge=0, le=1, description="Factor 1 +- saturation about grey.")
    hue: float = Field(0.0, ge=0, le=10, description="Rotation of the colours about the grey axis, radians.")
    flip: bool = Field(False, description="Mirror left-right with probability 1/2.")
    fill: int = Field(255, ge=0, le=255, description="Grey level outside the image.")


TransformConfig = Annotated[
    RandomResizedCropConfig | CenterCropConfig | ResizeConfig | AffineJitterConfig, Field(discriminator="name")
]


class StreamConfig(_Section):
    """Training images from plain WebDataset shards without an index: inexact, see docs/data.md."""

    urls: str = Field(description="Shards in webdataset's brace notation: https://host/train-{000000..000099}.tar")
    samples_per_epoch: int = Field(ge=1, description="Images per epoch, over all ranks.")
    resampled: bool = Field(
        True, description="Draw shards with replacement; false gives each loading process a fixed part of them."
    )
    shuffle_buffer: int = Field(1000, ge=1, description="Images in the shuffle buffer of each loading process.")


class DataConfig(_Section):
    """Source and preparation of the images."""

    unsaid: ClassVar[Mapping[str, Any]] = {"train_classes": None, "sampling_power": None, "repeated_augmentation": None}

    shards: str = Field(
        description="Folder of WebDataset shards with an index.json, or its location: https://, s3://, gs://, or "
        "pipe:COMMAND with {} for the file's name."
    )
    mode: Literal["indexed", "stream"] = Field(
        "indexed", description="indexed: exact epochs over data.shards; stream: training images from data.stream."
    )
    stream: StreamConfig | None = Field(None, description="Source of mode stream; evaluation reads data.shards.")
    train_split: SplitName = Field("train", description="Split of the index to train on.")
    test_split: SplitName | None = Field(
        "test",
        description="Split of the index to evaluate on; its classes are not trained, but for "
        "evaluation.allow_seen_classes. null: only data.validation_classes are evaluated, if set.",
    )
    num_classes: int | None = Field(
        None,
        ge=1,
        le=1 << 40,
        description="Number of classes of the training split, checked against the shards; null reads it from them.",
    )
    validation_classes: float | int | None = Field(
        None,
        description="Classes of the training split that are held out and evaluated in addition to the test split, "
        "for model selection: a share between 0 and 1, or a number; drawn by the seed. null trains on all.",
    )
    train_classes: int | None = Field(
        None,
        ge=2,
        description="Train on so many classes of the training split only, for curves over their number: drawn by the "
        "seed, fewer are a part of more, never validation classes. null trains on all others.",
    )
    num_workers: int = Field(
        4, ge=0, le=1024, description="Data loading processes per rank; 0 loads in the training process."
    )
    shuffle_window: int | None = Field(
        None, ge=1, description="Shards read at a time while shuffling; null shuffles over all."
    )
    images_per_class: int | None = Field(
        None,
        ge=1,
        description="Class-balanced batches: training.batch_size / images_per_class classes of this many images each; "
        "null visits every image once per epoch.",
    )
    sampling_power: _Power = Field(
        None,
        description="Long tails: a class of s images is drawn in proportion to s to this power; 0.5: square-root "
        "sampling, 0: all classes alike, 1 or null: every image once per epoch.",
    )
    repeated_augmentation: int | None = Field(
        None,
        ge=2,
        description="Copies of each image in a step, augmented differently; an epoch keeps its number of steps, and "
        "visits one part in so many of the images. null: one.",
    )
    drop_last: bool = Field(False, description="Drop the short last step of an epoch.")
    damaged_images: Literal["fail", "skip"] = Field(
        "fail",
        description="fail: a damaged image ends the run; skip: another one replaces it in training, and evaluation "
        "skips it. Each is listed in damaged.jsonl.",
    )
    max_damaged: float = Field(0.001, ge=0, le=1, description="Maximum share of damaged images in a split under skip.")
    cache_directory: str | None = Field(
        None, description="Cache folder of remote shards; null is ~/.cache/dist_proxygml/shards."
    )
    cache_limit: _ByteCount | None = Field(None, description="Maximum size of that cache; null keeps all.")
    cache_images: bool = Field(
        False, description="Keep decoded images in memory: small data sets only, with num_workers 0."
    )
    train_transform: TransformConfig = Field(description="Augmentation of training images.")
    test_transform: TransformConfig = Field(description="Preparation of test images.")

    _is_typed: bool = PrivateAttr(True)

    @property
    def is_typed(self) -> bool:
        """Whether the user, not a possibly untrusted run's folder, named the location of the shards."""
        return self._is_typed

    @model_validator(mode="after")
    def _one_process_keeps_images(self) -> "DataConfig":
        if self.cache_images and self.num_workers:
            raise ValueError(
                f"expected num_workers 0 with cache_images, got {self.num_workers}: each process would fill a cache of "
                "its own, and lose it after an epoch; set num_workers to 0 or cache_images to false"
            )
        return self

    @model_validator(mode="after")
    def _copies_of_an_image_differ(self) -> "DataConfig":
        if self.repeated_augmentation is not None and isinstance(self.train_transform, ResizeConfig | CenterCropConfig):
            raise ValueError(
                f"expected a train_transform that draws with repeated_augmentation, got "
                f"{self.train_transform.name!r}, which makes every copy of an image the same; take random_resized_crop "
                "or affine_jitter, or remove repeated_augmentation"
            )
        return self

    @model_validator(mode="after")
    def _test_images_are_not_augmented(self) -> "DataConfig":
        test = self.test_transform
        if isinstance(test, RandomResizedCropConfig) and test.augment:
            raise ValueError(
                f"expected no test_transform.augment, got {test.augment[0].name!r}: test images are not augmented; "
                "remove it"
            )
        return self

    @property
    def cache_limit_bytes(self) -> int | None:
        """cache_limit as a number."""
        return None if self.cache_limit is None else parse_bytes(self.cache_limit)

    @model_validator(mode="after")
    def _validation_classes_can_be_held_out(self) -> "DataConfig":
        wanted = self.validation_classes
        if isinstance(wanted, float) and not 0 < wanted < 1:
            raise ValueError(
                f"expected validation_classes to be a share between 0 and 1 or a whole number, got {wanted}; change "
                "it, or remove it to train on all classes"
            )
        for name, value in {"validation_classes": wanted, "train_classes": self.train_classes}.items():
            if value is not None and self.mode == "stream":
                raise ValueError(
                    f"expected no {name} with a stream, got {value}: it has no index to find their images by; remove "
                    "them"
                )
        return self

    @model_validator(mode="after")
    def _a_stream_is_configured_where_it_is_read(self) -> "DataConfig":
        if (self.mode == "stream") != (self.stream is not None):
            raise ValueError(
                f'expected data.stream with mode "stream" and only there, got mode "{self.mode}" '
                f"{'with' if self.stream else 'without'} it; add or remove one of them"
            )
        if self.mode == "stream" and self.num_classes is None:
            raise ValueError("expected data.num_classes with a stream, which has no index that says it; set it")
        names = ("images_per_class", "shuffle_window", "cache_images", "drop_last", "repeated_augmentation")
        exact = [name for name in names if getattr(self, name)]
        exact += ["sampling_power"] if self.sampling_power is not None else []
        if self.mode == "stream" and exact:
            raise ValueError(f"expected none of {', '.join(exact)} with a stream, which has no index; remove them")
        return self

    @model_validator(mode="after")
    def _one_order_at_a_time(self) -> "DataConfig":
        for name in ("sampling_power", "repeated_augmentation"):
            if getattr(self, name) is not None and self.images_per_class is not None:
                raise ValueError(
                    f"expected no {name} with images_per_class, which says itself how often classes and images come, "
                    f"got {getattr(self, name)} with {self.images_per_class}; remove one of them"
                )
        if self.sampling_power is not None and self.shuffle_window is not None:
            raise ValueError(
                f"expected no shuffle_window with sampling_power, whose draws come from all shards, got "
                f"{self.shuffle_window}; remove one of them"
            )
        return self


# ---- model and loss --------------------------------------------------------------------------------------------------


class LoraConfig(_Section):
    """Low-rank adapters (Hu et al. 2022), through peft: each chosen layer computes W x + alpha / rank * B A x, of which
    only A and B are trained."""

    rank: int = Field(8, ge=1, le=1 << 12, description="Rank of the adapters.")
    alpha: float = Field(16.0, gt=0, description="The adapters' output is multiplied by alpha / rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout before the adapters, in training.")
    target_modules: list[str] | None = Field(
        None,
        min_length=1,
        description="Linear layers that get adapters, by the end of their names; null takes query, key, value and "
        "output projections of the attention, attn.qkv and attn.proj in timm's transformers.",
    )


_Colours = tuple[float, float, float]
OF_TRAINING = frozenset({"frozen_stages", "lora", "gradient_checkpointing"})
"""Settings of a backbone that say how it is trained, and nothing of what it computes."""


class BackboneConfig(_Section):
    """Network from images to unit-length embeddings."""

    unsaid: ClassVar[Mapping[str, Any]] = {
        **{"mean": None, "std": None, "pooling": "average", "embedding_norm": None},
        **{"matryoshka_dims": [], "frozen_stages": None, "lora": None, "gradient_checkpointing": False},
    }

    name: str = Field(
        description="bn_inception, small_cnn, raw_pixels, iresnet18 to iresnet200, timm/NAME, timm/hf-hub:ORG/NAME, "
        "timm/local-dir:FOLDER or torchvision/NAME."
    )
    embedding_dim: int = Field(512, ge=1, le=1 << 16, description="Dimension D of the embedding.")
    matryoshka_dims: list[_Count] = Field(
        default_factory=list,
        description="Also train the first d dimensions of the embedding as embeddings, for each of these d, and "
        "evaluate them: it may be cut there (Matryoshka).",
    )
    pretrained: str | None = Field(
        None,
        description='Path of a weight file, "package", "timm", "torchvision", "hf-hub:ORG/NAME" or "local-dir:FOLDER"; '
        "null starts from random weights.",
    )
    mean: _Colours | None = Field(
        None,
        description="Mean of red, green and blue that is subtracted, of values from 0 to 1; null: that of the weights, "
        "which the start of a run fills in for timm's and torchvision's networks.",
    )
    std: _Colours | None = Field(None, description="Deviation that is divided by; null: likewise.")
    pool: int = Field(
        1, ge=1, le=64, description="Side of the grid that the feature map is averaged to; 1 is global average pooling."
    )
    pooling: Literal["average", "gem"] = Field(
        "average",
        description="How a feature map is pooled: average, or gem, the generalised mean with a learned exponent "
        "(Radenovic et al. 2018).",
    )
    embedding_norm: Literal["layer_norm"] | None = Field(
        None,
        description="layer_norm: the pooled features are brought to mean 0 and deviation 1, without trained scale and "
        "offset, before the embedding layer (Zhai and Wu 2019).",
    )
    batch_norm: Literal["train", "frozen"] = Field(
        "train",
        description="frozen keeps the running statistics fixed; scale and offset are still trained (as published).",
    )
    channels_last: bool = Field(False, description="Store images as NHWC; faster on CPUs and on tensor cores.")
    frozen_stages: int | None = Field(
        None,
        ge=0,
        description="Do not train the stem and this many stages after it (blocks, where there are no stages); their "
        "BatchNorm layers stay in evaluation mode. 0 freezes the stem; null trains everything.",
    )
    lora: LoraConfig | None = Field(
        None, description="Train low-rank adapters and the embedding layer only; null trains the weights themselves."
    )
    gradient_checkpointing: bool = Field(
        False,
        description="Keep only the inputs of the trunk's blocks and compute the rest again in the backward pass: less "
        "memory for about a third more time, the same numbers.",
    )
    options: dict[str, Any] = Field(default_factory=dict, description="Further options of the named backbone.")

    @model_validator(mode="after")
    def _colours_can_be_divided_by(self) -> "BackboneConfig":
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"expected std above 0, got {list(self.std)}; change it, or set it to null")
        if (self.mean is None) != (self.std is None):
            raise ValueError(f"expected mean and std both or neither, got {self.mean} and {self.std}; set the other")
        return self

    @model_validator(mode="after")
    def _prefixes_are_shorter_than_the_embedding(self) -> "BackboneConfig":
        check_matryoshka(self.matryoshka_dims, embedding_dim=self.embedding_dim, setting="backbone.matryoshka_dims")
        return self

    def of_trained_model(self) -> dict[str, Any]:
        """Return what a trained model is built from, as JSON: the settings without those of training alone."""
        return self.model_dump(mode="json", exclude=set(OF_TRAINING))

    @model_validator(mode="after")
    def _adapters_freeze_everything(self) -> "BackboneConfig":
        if self.lora is not None and self.frozen_stages is not None:
            raise ValueError(
                f"expected frozen_stages null with lora, which freezes the whole trunk, got {self.frozen_stages}; "
                "remove one of them"
            )
        return self


class MarginConfig(_Section):
    """Margin that the score of an image's own class must win by."""

    name: Literal["cosface", "arcface", "adaface"] = Field(
        description="cosface: subtracted from the score; arcface: added to the angle; adaface: both, by the length of "
        "the embedding before it is normalised."
    )
    margin: float = Field(ge=0, lt=1.5707963, description="m; for arcface and adaface in radians.")
    concentration: float = Field(
        0.333, gt=0, description="h of adaface: how much the margin follows the embedding's length."
    )


class ProxiesConfig(_Section):
    """The proxy bank and the loss on it: ProxyGML, or another head."""

    unsaid: ClassVar[Mapping[str, Any]] = {
        **{"negatives": "topk", "share": None, "class_score": "sum"},
        **{"margin": None, "learn_scale": False},
    }

    per_class: int = Field(1, ge=1, le=1 << 16, description="Proxies per class N.")
    negatives: Literal["topk", "all", "sampled"] = Field(
        "topk",
        description="Which proxies an image is compared with: topk: the most similar of all, exactly (ProxyGML); all "
        "(softmax, CosFace, ArcFace); sampled: those of a share of the classes, drawn anew in every step (PartialFC).",
    )
    share: float | None = Field(None, gt=0, le=1, description="Share of the classes that sampled draws in every step.")
    class_score: Literal["sum", "softmax", "max"] = Field(
        "sum",
        description="A class's score from its compared proxies: sum (ProxyGML), softmax (SoftTriple) or max; with one "
        "proxy per class they are the same.",
    )
    class_score_gamma: float = Field(0.1, gt=0, description="Temperature gamma of class_score softmax.")
    margin: MarginConfig | None = Field(None, description="Margin on the image's own class; null is none.")
    learn_scale: bool = Field(False, description="Train the scale, from its given value on.")
    ratio: float | None = Field(None, gt=0, le=1, description="Share r of all proxies kept per image: k = ceil(r*C*N).")
    topk: int | None = Field(None, ge=1, description="Number k of proxies kept per image; replaces ratio.")
    regularization_weight: float = Field(0.0, ge=0, description="Weight lambda of the proxy regulariser.")
    scale: float = Field(1.0, gt=0, description="Softmax scale s; 1 in every published run of ProxyGML.")
    regularization_anchors: int | None = Field(
        None,
        ge=1,
        description="Proxies drawn per micro-batch for an unbiased estimate of the regulariser; null takes all of them "
        "if the class sums fit the memory budget, otherwise as many as the batch has images.",
    )
    selection: Literal["auto", "gather", "candidates", "histogram"] = Field(
        "auto",
        description="How ranks find the global top-k: gather the bank, exchange candidates, sum histograms; auto: the "
        "one that moves the fewest bytes.",
    )
    memory_budget: _ByteCount | None = Field(
        None,
        description="Memory per rank for similarities during the search; each kept pair of image and proxy takes "
        "about 120 bytes in addition. null: 2 GiB on GPUs, 256 MiB on CPUs and for how the regulariser is computed.",
    )
    matmul_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="Precision of the inputs of products; similarities and sums are always float32."
    )
    fused: bool = Field(
        False,
        description="On NVIDIA GPUs, use this project's kernels instead of torch's operators; where k is at most a "
        "thirty-second of a rank's proxies they never store similarities.",
    )
    initialization: Literal["published", "unit", "class_mean"] = Field(
        "published",
        description="published: uniform in +-1/sqrt(C*N); unit: random unit vectors; class_mean: mean embedding of "
        "each class's images under the initial backbone.",
    )
    class_mean_images: int = Field(
        4, ge=1, description="Images of each class, drawn at random, that class_mean takes the mean of."
    )
    unit_norm: bool = Field(
        False, description="Normalise updated proxies after each step, for a constant effective step size."
    )

    @property
    def memory_budget_bytes(self) -> int | None:
        """memory_budget as a number; None: by device."""
        return None if self.memory_budget is None else parse_bytes(self.memory_budget)

    @model_validator(mode="after")
    def _anchors_belong_to_the_regularizer(self) -> "ProxiesConfig":
        if self.regularization_anchors is not None and self.regularization_weight == 0:
            raise ValueError(
                f"expected no regularization_anchors without a regulariser, got {self.regularization_anchors} with "
                "regularization_weight 0; remove them, or set the weight"
            )
        return self

    @model_validator(mode="after")
    def _choices_go_together(self) -> "ProxiesConfig":
        check_head(
            negatives=self.negatives,
            ratio=self.ratio,
            topk=self.topk,
            share=self.share,
            is_ratio_or_topk_needed=False,  # where another loss takes the place of all of these
            section="proxies.",
        )
        check_search(self.negatives, selection=self.selection, fused=self.fused, section="proxies.")
        check_margin(
            None if self.margin is None else self.margin.name,
            class_score=self.class_score,
            proxies_per_class=self.per_class,
            section="proxies.",
        )
        return self


class MinerConfig(_Section):
    """A miner of pytorch-metric-learning."""

    name: str = Field(description="Name in pytorch_metric_learning.miners, such as MultiSimilarityMiner.")
    options: dict[str, Any] = Field(default_factory=dict, description="Its arguments.")


class CrossBatchMemoryConfig(_Section):
    """Earlier embeddings that a batch is compared with, too (Wang et al., CVPR 2020)."""

    memory_size: int = Field(ge=1, le=1 << 32, description="Number of embeddings, at least those of a global batch.")
    start_step: int = Field(
        0, ge=0, description="Optimizer steps before the memory is filled and used, while embeddings still move fast."
    )


class LossConfig(_Section):
    """A loss of pytorch-metric-learning in place of the head of proxies; null: the head of proxies."""

    name: str = Field(
        pattern=r"^pml/\w+$",
        description="pml/NAME: a loss of pytorch_metric_learning.losses, such as pml/MultiSimilarityLoss.",
    )
    options: dict[str, Any] = Field(
        default_factory=dict,
        description='Its arguments; distance, reducer and regularizers as {"name": ..., "options": {...}}.',
    )
    miner: MinerConfig | None = Field(None, description="Miner that chooses pairs or triplets; null: all.")
    cross_batch_memory: CrossBatchMemoryConfig | None = Field(
        None, description="Also compare with the embeddings of earlier batches; null: do not."
    )

    def arguments(self, accumulation: int) -> dict[str, Any]:
        """The arguments of PmlLoss, for so many micro-batches per step."""
        memory = self.cross_batch_memory
        return {
            "name": self.name.removeprefix("pml/"),
            "options": self.options,
            "miner": None if self.miner is None else (self.miner.name, self.miner.options),
            "memory_size": None if memory is None else memory.memory_size,
            "memory_after": 0 if memory is None else memory.start_step * accumulation,
        }


# ---- optimisation ----------------------------------------------------------------------------------------------------


class OptimizerConfig(_Section):
    """Optimizer of backbone and proxies; one rule, separate learning rates."""

    unsaid: ClassVar[Mapping[str, Any]] = {"weight_decay_on": "all", "layer_decay": None}

    name: Literal["adam", "adamw"] = Field(
        "adam", description="Update rule; adam adds weight decay to the gradient (L2)."
    )
    backbone_lr: float = Field(gt=0, description="Learning rate of the backbone.")
    embedding_lr: float | None = Field(
        None, gt=0, description="Learning rate of the embedding layer; null takes backbone_lr."
    )
    proxies_name: Literal["adam", "adamw", "sgd", "rowwise_adagrad", "sparse_adam"] | None = Field(
        None,
        description="Update rule of the proxies; null takes name. rowwise_adagrad and sparse_adam access only "
        "proxies that an image kept.",
    )
    proxies_momentum: float = Field(0.0, ge=0, lt=1, description="sgd: momentum for the proxies.")
    proxies_lr: float = Field(
        gt=0, description="Learning rate of the proxies. Do not scale it with the number of ranks."
    )
    weight_decay: float = Field(0.0, ge=0, description="Weight decay of the backbone.")
    weight_decay_on: Literal["all", "matrices"] = Field(
        "all",
        description="Parameters of the backbone with weight decay; matrices leaves out biases, norms and embeddings "
        "(positions, class tokens).",
    )
    layer_decay: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Factor on the learning rate from each layer of the trunk to the one before it, such as 0.75: the "
        "last block learns at 0.75 times backbone_lr, the stem slowest. null: all layers alike.",
    )
    proxies_weight_decay: float = Field(0.0, ge=0, description="Weight decay of the proxies.")
    eps: float = Field(
        1e-8,
        gt=0,
        description="eps of every rule; 0.01 in the published runs with Adam, where it determines the effective step.",
    )
    betas: tuple[_Share, _Share] = Field((0.9, 0.999), description="Adam's decay rates.")
    proxies_clip_norm: float | None = Field(
        None,
        gt=0,
        description="Maximum norm of the proxies' gradient over all ranks (the backbone: deepspeed.gradient_clipping).",
    )

    @property
    def proxies_rule(self) -> str:
        """Update rule of the proxies."""
        return self.proxies_name or self.name

    @model_validator(mode="after")
    def _proxies_options_belong_to_the_rule(self) -> "OptimizerConfig":
        if self.proxies_momentum > 0 and self.proxies_rule != "sgd":
            raise ValueError(
                f"expected proxies_momentum 0 for {self.proxies_rule!r}, got {self.proxies_momentum}: only sgd has "
                'momentum; remove it, or set proxies_name to "sgd"'
            )
        if self.proxies_weight_decay > 0 and self.proxies_rule in ("rowwise_adagrad", "sparse_adam"):
            raise ValueError(
                f"expected proxies_weight_decay 0 for {self.proxies_rule!r}, which does not update proxies that no "
                f"image kept, got {self.proxies_weight_decay}; remove it, or set proxies_name to adam, adamw or sgd"
            )
        return self


class ScheduleConfig(_Section):
    """Factor on all learning rates as a function of training progress."""

    name: Literal["constant", "step", "cosine"] = Field("constant", description="Shape of the schedule.")
    milestones: list[_Count] = Field(
        default_factory=list, description="step: epochs (1-based) at the start of which gamma is applied."
    )
    gamma: float = Field(0.1, gt=0, description="step: factor at each milestone.")
    warmup_steps: int = Field(0, ge=0, description="Linear warm-up from 0 over this many optimizer steps.")

    @model_validator(mode="after")
    def _milestones_belong_to_step(self) -> "ScheduleConfig":
        if (self.name == "step") != bool(self.milestones):
            raise ValueError(
                f"milestones {self.milestones} do not fit schedule {self.name!r}: only 'step' has milestones"
            )
        return self


class TrainingConfig(_Section):
    """The training run."""

    unsaid: ClassVar[Mapping[str, Any]] = {"ema_decay": None, "float32_matmul": "highest"}

    epochs: int = Field(ge=1, description="Number of passes over the training split.")
    batch_size: int = Field(
        ge=1, le=1 << 24, description="Images of one optimizer step, over all ranks and accumulated micro-batches."
    )
    max_steps: int | None = Field(None, ge=1, description="Stop after this many optimizer steps; null: all epochs.")
    frozen_trunk_epochs: list[int] = Field(
        default_factory=list,
        description="Epochs (1-based) that train only embedding layer and proxies; [2] is the published warm-up.",
    )
    ema_decay: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Decay of a moving average of the backbone's weights, say 0.999, which is what is evaluated, "
        "exported and served; null uses the weights of the last step.",
    )
    compile: bool = Field(
        False,
        description="Run the trunk through torch.compile in training: faster steps after minutes of compilation, the "
        "same numbers up to rounding and dropout's draws.",
    )
    max_left_out: int = Field(
        3, ge=1, description="Consecutive NaN steps before the run rolls back to its last checkpoint."
    )
    max_rollbacks: int = Field(2, ge=0, description="Rollbacks before the run ends.")
    start_timeout: float = Field(
        300.0, gt=0, description="Time-out in seconds of each wait for other ranks while the run starts."
    )
    step_timeout: float | None = Field(
        1200.0,
        gt=0,
        le=1e8,
        description="Seconds after which a hanging step ends the process; null waits forever.",
    )
    float32_matmul: Literal["highest", "high"] = Field(
        "highest",
        description="Float32 products of the backbone on GPUs: highest, or high (TF32). The head's are exact either "
        "way; convolutions use TF32 by torch's default.",
    )
    cudnn_benchmark: bool = Field(
        False, description="On GPUs, time cuDNN's algorithms for each new shape of images and keep the fastest."
    )
    deterministic: bool = Field(
        False,
        description="On GPUs, choose operators whose sums have a fixed order, so that a repeated or resumed run gives "
        "the same bits; slower, see docs/gpu.md.",
    )

    @model_validator(mode="after")
    def _deterministic_chooses_no_algorithm_by_time(self) -> "TrainingConfig":
        if self.deterministic and self.cudnn_benchmark:
            raise ValueError(
                "expected cudnn_benchmark false with deterministic, got true: which algorithm is fastest differs from "
                "start to start; set one of them to false"
            )
        return self


class PairsConfig(_Section):
    """Verification: TAR at FAR over pairs of images, and with listed pairs the accuracy over their folds."""

    of: Literal["all", "listed"] = Field(
        "all",
        description="all: each two images of the evaluated split, or each query with the gallery; listed: the pairs "
        "that come with the shards of a verification set, for the test split alone.",
    )
    far: list[Annotated[float, Field(gt=0, lt=1)]] = Field(
        default_factory=lambda: [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1],
        min_length=1,
        max_length=100,
        description="False accept rates; one below 1 / pairs of different classes is not measurable and left out.",
    )

    @property
    def metrics(self) -> list[str]:
        """The metrics that pairs give, without standard deviations."""
        return [*map(far_metric, self.far), *(["pair_accuracy"] if self.of == "listed" else [])]

    @model_validator(mode="after")
    def _rates_differ(self) -> "PairsConfig":
        if len(set(map(far_metric, self.far))) < len(self.far):
            raise ValueError(f"expected different false accept rates, got far {self.far}; name each once")
        return self


class EvaluationConfig(_Section):
    """When and how the test split, and validation classes if there are any, are evaluated."""

    unsaid: ClassVar[Mapping[str, Any]] = {"exclude_same": None, "pairs": None, "kmeans_on_gpu": False}

    every_epochs: int = Field(
        1, ge=0, description="Evaluate every this many epochs, and after the last; 0 only after the last."
    )
    at_start: bool = Field(True, description="Evaluate before the first step: finds data and memory faults early.")
    raw_pixels: bool = Field(
        False, description="Also evaluate raw pixels on the test split at the start, as a baseline."
    )
    batch_size: int = Field(64, ge=1, description="Images per forward pass of one rank.")
    protocol: Literal["custom", "cub", "cars", "sop", "inshop", "market1501", "msmt17"] = Field(
        "custom",
        description="A published protocol: sets K of Recall@K and requires its numbers of classes and images.",
    )
    recall_at: list[_Count] = Field(
        default_factory=lambda: [1, 2, 4, 8],
        min_length=1,
        description="K of Recall@K; a published protocol sets its own.",
    )
    gallery_split: SplitName | None = Field(
        None,
        description="Split searched by the images of data.test_split; null searches each among all others.",
    )
    exclude_same: Literal["camera"] | None = Field(
        None,
        description="camera: images of the query's class by its own camera are left out of its ranking "
        "(re-identification); market1501 and msmt17 do so.",
    )
    allow_seen_classes: bool = Field(
        False,
        description="Accept a test split with trained classes, such as new photos of known products; results state the "
        "numbers of seen and unseen classes.",
    )
    kmeans_seeds: int = Field(5, ge=0, description="k-means runs for NMI, AMI and F1; 0 skips them.")
    kmeans_on_gpu: bool = Field(
        False,
        description="Assign the points of k-means on the ranks' GPUs, if faiss can use them; distances that are nearly "
        "equal may fall otherwise than on a CPU, so results name it.",
    )
    pairs: PairsConfig | None = Field(
        None, description="Also measure verification, TAR at FAR over pairs of images; {} for all pairs. null: do not."
    )
    legacy_proxygml: bool = Field(
        False, description="Also compute the published evaluation's metrics (cub, cars, sop), prefixed legacy_."
    )
    search: Literal["faiss", "counter"] = Field(
        "faiss", description="Find neighbours with faiss, or count ranks by matrix products; the numbers are the same."
    )
    gallery: Literal["auto", "replicated", "sharded"] = Field(
        "auto",
        description="Every rank searches the full gallery for a share of the queries, or its part of the gallery for "
        "all queries; auto divides a gallery over half of a GPU's free memory. The numbers are the same.",
    )
    memory_budget: _ByteCount = Field(
        "256 MiB",
        description="Memory per rank for lists and scores during the search; more is faster on a GPU.",
    )

    @property
    def memory_budget_bytes(self) -> int:
        """memory_budget as a number."""
        return parse_bytes(self.memory_budget)

    @property
    def excluded(self) -> str | None:
        """exclude_same, or that of the protocol."""
        return PROTOCOLS[self.protocol].exclude_same if self.protocol in PROTOCOLS else self.exclude_same

    @property
    def metrics(self) -> list[str]:
        """The metrics that an evaluation gives, without standard deviations."""
        names = [*(f"recall@{k}" for k in self.recall_at), "r_precision", "map@r", "map", "mrr", "precision@1_macro"]
        names += ["nmi", "ami", "f1"] if self.kmeans_seeds else []
        names += self.pairs.metrics if self.pairs else []
        if self.legacy_proxygml:
            names += [f"legacy_recall@{k}" for k in self.recall_at] + (["legacy_nmi"] if self.kmeans_seeds else [])
        return names

    @model_validator(mode="before")
    @classmethod
    def _a_protocol_brings_its_k(cls, raw: Any) -> Any:
        named = raw.get("protocol") if isinstance(raw, dict) else None
        protocol = PROTOCOLS.get(named) if isinstance(named, str) else None
        if protocol is None:
            return raw
        own = list(protocol.recall_at)
        if raw.get("recall_at", own) != own:
            raise ValueError(
                f"protocol {raw['protocol']!r} reports Recall@K for K {own}, got recall_at {raw['recall_at']}; remove "
                'recall_at, or take protocol "custom"'
            )
        return {**raw, "recall_at": own}

    @model_validator(mode="after")
    def _a_protocol_fits_the_rest(self) -> "EvaluationConfig":
        protocol = PROTOCOLS.get(self.protocol)
        if protocol is not None and (protocol.num_gallery is None) != (self.gallery_split is None):
            raise ValueError(
                f"protocol {self.protocol!r} expects "
                f"{'no gallery_split' if protocol.num_gallery is None else 'a gallery_split'}, got "
                f"{self.gallery_split!r}; {'remove it' if self.gallery_split else 'name it'}, or change the protocol"
            )
        if self.exclude_same not in (None, self.excluded):
            raise ValueError(
                f"protocol {self.protocol!r} excludes the query alone, got exclude_same {self.exclude_same!r}; "
                'set it to null, or take protocol "custom"'
            )
        if self.legacy_proxygml and self.protocol not in LEGACY_PROTOCOLS:
            raise ValueError(
                f"expected evaluation.protocol to be one of {', '.join(LEGACY_PROTOCOLS)} with legacy_proxygml, got "
                f"{self.protocol!r}; name one of them, or set legacy_proxygml to false"
            )
        return self


class CheckpointConfig(_Section):
    """Checkpoints of the run."""

    every_steps: int | None = Field(
        None,
        ge=1,
        description="Optimizer steps between checkpoints; null: one per epoch. keep_best adds one per evaluation.",
    )
    asynchronous: bool = Field(
        False,
        description="Write checkpoints during training, from a copy in host memory.",
    )
    keep_last: int = Field(2, ge=1, description="Number of newest checkpoints to keep.")
    keep_every: int | None = Field(
        None,
        ge=1,
        description="Also keep, permanently, the first checkpoint at or after every multiple of this many steps.",
    )
    keep_best: str | None = Field(
        None,
        description="Also keep the checkpoint with the best evaluation by this metric, such as recall@1, "
        "on data.validation_classes if set, otherwise on the test split; the newest if nothing is evaluated.",
    )
    init_from: str | None = Field(
        None,
        description="Start a new run from a checkpoint, a run's folder (its newest checkpoint) or an export; unused "
        "when a run is resumed. null starts from backbone.pretrained and new proxies.",
    )
    init_proxies: bool = Field(
        True,
        description="With init_from: classes of the same name keep their proxies; false takes over the backbone only.",
    )

    @model_validator(mode="after")
    def _proxies_come_from_somewhere(self) -> "CheckpointConfig":
        if not self.init_proxies and self.init_from is None:
            raise ValueError("expected init_from with init_proxies false, got none; set it, or remove init_proxies")
        return self


class TelemetryConfig(_Section):
    """Logging."""

    log_every_steps: int = Field(
        10, ge=1, description="Optimizer steps between lines of metrics.jsonl and TensorBoard scalars."
    )
    progress_bar: bool = Field(True, description="Show a progress bar on rank 0.")
    projector: bool | Annotated[int, Field(ge=1, le=10_000)] = Field(
        True,
        description="Number of the last evaluation's embeddings in TensorBoard's projector; true: up to 10,000.",
    )
    trackers: list[Literal["wandb", "mlflow", "trackio"]] = Field(
        [], description="Experiment trackers that get the numbers, too: wandb, mlflow, trackio (extras of these names)."
    )
    tracker_project: str = Field(
        "dist_proxygml", min_length=1, description="Project, or experiment, in which trackers show the run."
    )


# ---- the whole -------------------------------------------------------------------------------------------------------

# Top-level keys of DeepSpeed that work with this project, and their types. DeepSpeed itself ignores unknown keys, and
# reads many values only when it trains.
_DEEPSPEED_KEYS: dict[str, str] = {
    **dict.fromkeys(("bf16", "checkpoint", "comms_logger", "data_types", "flops_profiler"), "an object"),
    **dict.fromkeys(("fp16", "torch_autocast", "zero_optimization"), "an object"),
    **dict.fromkeys(("dump_state", "memory_breakdown", "prescale_gradients"), "true or false"),
    **dict.fromkeys(("wall_clock_breakdown", "zero_allow_untested_optimizer"), "true or false"),
    "zero_force_ds_cpu_optimizer": "true or false",
    **dict.fromkeys(("gradient_accumulation_steps", "steps_per_print"), "a whole number of at least 1"),
    **dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu"), "a whole number of at least 1"),
    "gradient_clipping": "a number of at least 0",
    "gradient_predivide_factor": "a number above 0",
    "communication_data_type": "a string",
}
# Of these, what changes no number of a run: what DeepSpeed prints and measures, and a rank's part of a batch, which
# follows from the number of ranks.
_NEUTRAL_DEEPSPEED_KEYS = (
    *("comms_logger", "dump_state", "flops_profiler", "memory_breakdown", "steps_per_print"),
    *("train_micro_batch_size_per_gpu", "wall_clock_breakdown"),
)
# DeepSpeed's keys that are owned by another setting here, or break what the loss relies on: what to use instead.
_OWNED_DEEPSPEED_KEYS = {
    "optimizer": "the section optimizer",
    "scheduler": "the section schedule",
    "amp": "deepspeed.fp16 or bf16",
    "gradient_allreduce_op": "its default: the loss relies on the mean over ranks",
    "activation_checkpointing": "backbone.gradient_checkpointing: the networks here do not ask DeepSpeed for it",
    "compile": "training.compile: nothing here asks DeepSpeed for it",
    "managed_gradient_accumulation": "its default: proxies and backbone must step together",
}


class Config(_Section):
    """A complete training run."""

    unsaid: ClassVar[Mapping[str, Any]] = {"loss": None}

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Name of the run and of its folder.")
    runs_dir: str = Field("runs", description="Folder in which run folders are created.")
    seed: int = Field(0, ge=0, description="Seed of initialisation, sample order and augmentation.")
    data: DataConfig
    backbone: BackboneConfig
    proxies: ProxiesConfig = Field(default_factory=lambda: ProxiesConfig())
    loss: LossConfig | None = Field(
        None, description="A loss of pytorch-metric-learning in place of the head of proxies; null: that head."
    )
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    training: TrainingConfig
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    telemetry: TelemetryConfig = Field(default_factory=TelemetryConfig)
    deepspeed: dict[str, Any] = Field(
        default_factory=dict,
        description="Passed to DeepSpeed unchanged: zero_optimization, bf16, gradient_clipping, ...",
    )

    @property
    def accumulation(self) -> int:
        """Micro-batches per optimizer step."""
        return int(self.deepspeed.get("gradient_accumulation_steps", 1))

    @property
    def num_classes(self) -> int:
        """data.num_classes, if configured or filled in by training/data.py.

        Raises:
            ValueError: it is null.
        """
        if self.data.num_classes is None:
            raise ValueError("expected data.num_classes, got null; set it, or make the shards available")
        return self.data.num_classes

    @property
    def num_validation_classes(self) -> int:
        """Number of held-out classes of the training split; a share is rounded.

        Raises:
            ValueError: it is below two, or all; or the number of classes is unknown.
        """
        wanted = self.data.validation_classes
        if wanted is None:
            return 0
        num_classes = self.num_classes
        num_held_out = wanted if isinstance(wanted, int) else round(wanted * num_classes)
        if not 2 <= num_held_out < num_classes:
            raise ValueError(
                f"expected data.validation_classes to hold out at least 2 and not all of the {num_classes} classes of "
                f"data.num_classes, got {wanted}, which is {num_held_out} classes; change it, or remove it to train on "
                "all"
            )
        return num_held_out

    @property
    def num_trained_classes(self) -> int:
        """Number C of classes of the proxy bank: those of the training split that are not held out, or some of them.

        Raises:
            ValueError: as `num_validation_classes`; or data.train_classes is more than there are.
        """
        num_others = self.num_classes - self.num_validation_classes
        wanted = self.data.train_classes
        if wanted is not None and wanted > num_others:
            raise ValueError(
                f"expected data.train_classes up to {num_others}, the classes that are not held out, got {wanted}; "
                "lower it, or remove it to train on all"
            )
        return num_others if wanted is None else wanted

    @property
    def is_evaluated(self) -> bool:
        """Whether the run has images to evaluate: a test split or validation classes."""
        return self.data.test_split is not None or self.data.validation_classes is not None

    @property
    def run_directory(self) -> Path:
        """Folder of this run."""
        return Path(self.runs_dir) / self.name

    @model_validator(mode="after")
    def _deepspeed_does_not_contradict(self) -> "Config":
        for key in self.deepspeed:
            if key in _OWNED_DEEPSPEED_KEYS:
                instead = _OWNED_DEEPSPEED_KEYS[key]
                raise ValueError(f"deepspeed.{key} is set, but it is decided elsewhere; remove it and use {instead}")
            if key not in _DEEPSPEED_KEYS:
                nearest = difflib.get_close_matches(key, _DEEPSPEED_KEYS, n=1, cutoff=0.0)[0]
                raise ValueError(f"deepspeed.{key}: unknown or unsupported key; did you mean {nearest!r}?")
        _check_deepspeed_values(self.deepspeed)
        stated = self.deepspeed.get("train_batch_size", self.training.batch_size)
        if stated != self.training.batch_size:
            raise ValueError(
                f"training.batch_size is {self.training.batch_size} but deepspeed.train_batch_size is {stated}; "
                "make them equal or remove the one in deepspeed"
            )
        return self

    @model_validator(mode="after")
    def _batches_and_streams_fit_the_rest(self) -> "Config":
        images_per_class = self.data.images_per_class
        if images_per_class and self.training.batch_size % images_per_class:
            raise ValueError(
                f"expected training.batch_size to be a multiple of data.images_per_class, got "
                f"{self.training.batch_size} and {images_per_class}; change one of them"
            )
        num_copies = self.data.repeated_augmentation
        if num_copies and self.training.batch_size % num_copies:
            raise ValueError(
                f"expected training.batch_size to be a multiple of data.repeated_augmentation, got "
                f"{self.training.batch_size} and {num_copies}; change one of them"
            )
        if self.data.stream and self.data.stream.samples_per_epoch < self.training.batch_size:
            raise ValueError(
                f"expected data.stream.samples_per_epoch of at least training.batch_size ({self.training.batch_size}), "
                f"got {self.data.stream.samples_per_epoch}; change one of them"
            )
        if self.data.stream and self.proxies.initialization == "class_mean":
            raise ValueError(
                "expected proxies.initialization published or unit with a stream, got class_mean, which needs every "
                "image of the index; change one of them"
            )
        if self.data.stream and self.checkpoint.init_from is not None and self.checkpoint.init_proxies:
            raise ValueError(
                "expected checkpoint.init_proxies false with checkpoint.init_from and a stream, which has no class "
                "names to find proxies by, got true; set it to false, or read shards with an index"
            )
        return self

    @model_validator(mode="after")
    def _sparse_adam_has_sparse_gradients(self) -> "Config":
        if self.optimizer.proxies_rule == "sparse_adam":
            check_sparse_gradient(
                negatives=self.proxies.negatives,
                selection=self.proxies.selection,
                regularization_weight=self.proxies.regularization_weight,
                section="proxies.",
                wanted_by='optimizer.proxies_name "sparse_adam"',
                instead="set proxies_name to rowwise_adagrad, sgd or adam",
            )
        return self

    @model_validator(mode="after")
    def _the_head_is_one_of_two(self) -> "Config":
        proxies, loss = self.proxies, self.loss
        if loss is None:
            if proxies.negatives == "topk":
                check_ratio_or_topk(proxies.ratio, proxies.topk, section="proxies.", at_least=1)
            return self
        for name, default in ProxiesConfig():
            if getattr(proxies, name) != default:
                raise ValueError(
                    f"expected no settings of the section proxies with loss.name {loss.name!r}, which takes the place "
                    f"of that head, got proxies.{name} {getattr(proxies, name)!r}; remove the section, or loss"
                )
        if self.backbone.matryoshka_dims:
            raise ValueError(
                f"expected no backbone.matryoshka_dims with loss.name {loss.name!r}: the head of proxies trains them, "
                f"got {self.backbone.matryoshka_dims}; remove them, or loss"
            )
        if self.optimizer.proxies_rule in ("rowwise_adagrad", "sparse_adam"):
            raise ValueError(
                f'expected optimizer.proxies_name "adam", "adamw" or "sgd" with loss.name {loss.name!r}, whose '
                f"gradients are dense, got {self.optimizer.proxies_name!r}; change it"
            )
        if self.checkpoint.init_from is not None and self.checkpoint.init_proxies:
            raise ValueError(
                f"expected checkpoint.init_proxies false with checkpoint.init_from and loss.name {loss.name!r}, which "
                "has no proxies to find by class names, got true; set it to false to take over the backbone only"
            )
        num_images = -(-self.training.batch_size // self.accumulation)
        if loss.cross_batch_memory is not None and loss.cross_batch_memory.memory_size < num_images:
            raise ValueError(
                f"expected loss.cross_batch_memory.memory_size of at least the {num_images} images of a batch, got "
                f"{loss.cross_batch_memory.memory_size}; raise it, or lower training.batch_size"
            )
        return self

    @model_validator(mode="after")
    def _validation_classes_leave_some_to_train(self) -> "Config":
        if self.data.num_classes is not None:  # otherwise checked when the shards have been read
            assert self.num_trained_classes > 0  # or it has raised
        return self

    @model_validator(mode="after")
    def _queries_are_not_their_own_gallery(self) -> "Config":
        check_gallery_split(
            self.evaluation.gallery_split,
            query_split=self.data.test_split,
            setting="evaluation.gallery_split",
            of="data.test_split",
        )
        return self

    @model_validator(mode="after")
    def _a_test_split_is_there_where_it_is_needed(self) -> "Config":
        evaluation = self.evaluation
        needing = {"protocol": evaluation.protocol != "custom", "gallery_split": evaluation.gallery_split is not None}
        for name in (name for name, is_set in needing.items() if is_set and self.data.test_split is None):
            raise ValueError(
                f"expected data.test_split with evaluation.{name} {getattr(evaluation, name)!r}, got null; name the "
                f"split, or set evaluation.{name} to {'custom' if name == 'protocol' else 'null'}"
            )
        return self

    @model_validator(mode="after")
    def _best_checkpoint_is_measured(self) -> "Config":
        wanted, evaluation = self.checkpoint.keep_best, self.evaluation
        measured = [name for name in evaluation.metrics if not name.startswith("legacy_")]
        if evaluation.pairs and evaluation.pairs.of == "listed" and self.data.validation_classes is not None:
            measured = [name for name in measured if name not in evaluation.pairs.metrics]  # they are of the test split
        if wanted is not None and wanted not in measured:
            raise ValueError(
                f"checkpoint.keep_best is {wanted!r}, but the evaluation measures {', '.join(measured)}; take one of "
                "them, or change evaluation.recall_at or evaluation.kmeans_seeds"
            )
        return self

    @model_validator(mode="after")
    def _frozen_epochs_exist(self) -> "Config":
        beyond = [epoch for epoch in self.training.frozen_trunk_epochs if not 1 <= epoch <= self.training.epochs]
        if beyond:
            raise ValueError(f"training.frozen_trunk_epochs {beyond} lie outside 1..{self.training.epochs}")
        return self

    @model_validator(mode="after")
    def _adapters_have_no_average(self) -> "Config":
        if self.training.ema_decay is not None and self.backbone.lora is not None:
            raise ValueError(
                "expected training.ema_decay null with backbone.lora, whose adapters are merged in what a checkpoint "
                f"averages, so that no run could resume, got {self.training.ema_decay}; remove one of them"
            )
        return self

    @model_validator(mode="after")
    def _frozen_weights_come_from_somewhere(self) -> "Config":
        kept = {"frozen_stages": self.backbone.frozen_stages, "lora": self.backbone.lora}
        name = next((name for name, value in kept.items() if value is not None), None)
        if name is not None and self.backbone.pretrained is None and self.checkpoint.init_from is None:
            raise ValueError(
                f"expected backbone.pretrained or checkpoint.init_from with backbone.{name}, got neither: random "
                f"weights would never be trained; set one of them, or remove backbone.{name}"
            )
        return self

    def micro_batch_size(self, world_size: int) -> int:
        """Compute the number of images of one rank in one micro-batch.

        Raises:
            ValueError: the batch does not divide over the ranks and micro-batches, or contradicts the DeepSpeed
                section.
        """
        slots = world_size * self.accumulation
        micro, rest = divmod(self.training.batch_size, slots)
        if rest:
            allowed = [
                w for w in range(1, 2 * world_size + 1) if self.training.batch_size % (w * self.accumulation) == 0
            ]
            other = f"one of {allowed} ranks" if allowed else "another deepspeed.gradient_accumulation_steps"
            raise ValueError(
                f"training.batch_size {self.training.batch_size} does not divide over {world_size} ranks x "
                f"{self.accumulation} micro-batches; use a multiple of {slots}, or {other}"
            )
        stated = self.deepspeed.get("train_micro_batch_size_per_gpu", micro)
        if stated != micro:
            raise ValueError(
                f"deepspeed.train_micro_batch_size_per_gpu is {stated}, but training.batch_size "
                f"{self.training.batch_size} over {world_size} ranks x {self.accumulation} micro-batches gives "
                f"{micro}; remove it or change the number of ranks"
            )
        return micro


def parse_bytes(text: str) -> int:
    """Parse a byte count with a binary unit: "1.5 KiB" -> 1536.

    Raises:
        ValueError: it is not a number with a unit, or not from 1 to 2^62.
    """
    match = re.fullmatch(_BYTES, text)
    if match is None:
        raise ValueError(f'expected a number of B, KiB, MiB, GiB or TiB such as "256 MiB", got {text!r}')
    number = float(match[1]) * 1024.0 ** ("B", "KiB", "MiB", "GiB", "TiB").index(match[2])
    if not 1 <= number <= _MAX_NUMBER:
        raise ValueError(f"expected from 1 B to 2^62 bytes, got {text[:40]}; change it")
    return int(number)


_CONFIGS = Path(__file__).parent / "configs"  # those of the repository, also in a wheel


def load_config(path: str | Path, overrides: typing.Sequence[str] = ()) -> Config:
    """Read and validate a JSON configuration, with `a.b=value` overrides applied first.

    A value is parsed as JSON if possible, otherwise taken as a string. A name without a suffix, such as demo_cpu or
    paper/sop, refers to a configuration shipped with the package.

    Raises:
        ValueError: the file is missing or not JSON, a key is unknown (the nearest is suggested), a type is wrong, or
            settings contradict each other.
    """
    path = Path(path)
    if not path.suffix and not path.exists() and (_CONFIGS / f"{path}.json").is_file():
        path = _CONFIGS / f"{path}.json"
    if not path.is_file():
        nearby = sorted({str(p) for folder in (path.parent, Path("configs")) for p in folder.glob("*.json")})
        nearby += sorted(str(p.relative_to(_CONFIGS).with_suffix("")) for p in _CONFIGS.rglob("*.json"))
        raise ValueError(f"expected a JSON configuration at {path}, found no such file; there are: {', '.join(nearby)}")
    try:
        raw = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_with_each_key_once)
    except UnicodeDecodeError as error:
        found = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}.get(path.read_bytes()[:2], "another encoding")
        raise ValueError(
            f"expected {path} in UTF-8, got {found} (byte {error.start}: {error.reason}); save it as UTF-8"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected valid JSON in {path}, got: {error}; edit it") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path} must hold one JSON object, got {type(raw).__name__}")
    for override in overrides:
        apply_override(raw, override)
    encoding = sys.getfilesystemencoding()
    if encoding != "utf-8" and not json.dumps(raw, ensure_ascii=False).isascii():
        raise ValueError(
            f"expected a locale with UTF-8 for the settings of {path}, which are not all ASCII, got {encoding}; set "
            "LC_ALL=C.UTF-8 or PYTHONUTF8=1"
        )
    return parse_config(raw, source=str(path))


def load_run_config(run_directory: Path, overrides: typing.Sequence[str] = ()) -> Config:
    """Load the configuration of a run's folder, which may be untrusted: unless an override names the shards, they count
    as not typed by the user. Raises ValueError as `load_config`.
    """
    if not (run_directory / "config.json").is_file():
        places = (run_directory, run_directory.parent)
        runs = sorted({str(path.parent) for place in places for path in place.glob("*/config.json")})
        raise ValueError(
            f"expected the folder of a run at {run_directory}, found no config.json in it; "
            f"{'there are: ' + ', '.join(runs[:20]) if runs else 'correct the path'}"
        )
    config = load_config(run_directory / "config.json", overrides)
    config.data._is_typed = any(override.partition("=")[0] in ("data", "data.shards") for override in overrides)
    return config


def parse_model(backbone: Any, transform: Any, *, source: str) -> tuple[BackboneConfig, TransformConfig]:
    """Parse the network and its preprocessing as stored in an export.

    Raises:
        ValueError: the settings are invalid; the message names `source`.
    """
    try:
        parsed: TransformConfig = TypeAdapter(TransformConfig).validate_json(json.dumps(transform))
        return BackboneConfig.model_validate_json(json.dumps(backbone)), parsed
    except ValidationError as error:
        problems = "; ".join(_explain(problem) for problem in error.errors(include_url=False))
        raise ValueError(f"{source} does not describe a backbone and its preprocessing: {problems}") from None


def flattened(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted names and values of nested settings."""
    for name, value in section.items():
        if isinstance(value, Mapping) and value:
            yield from flattened(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def without_neutral_keys(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out of flat settings those of DeepSpeed that change no number of a run, and its section if it is empty."""
    neutral = {"deepspeed", *(f"deepspeed.{key}" for key in _NEUTRAL_DEEPSPEED_KEYS)}
    return {name: value for name, value in settings.items() if ".".join(name.split(".")[:2]) not in neutral}


def parse_config(raw: dict[str, Any], *, source: str) -> Config:
    """Validate a configuration that is already a dictionary; `source` names it in errors."""
    try:
        _refuse_odd_numbers(raw)
        return Config.model_validate_json(json.dumps(raw))  # strict types of JSON, where a tuple is a list
    except ValidationError as error:
        problems = "\n".join(f"  {_explain(problem)}" for problem in error.errors(include_url=False))
        raise ValueError(f"{source} is not a valid configuration:\n{problems}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} is not a valid configuration: {error}") from None


def _with_each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; `json` alone would take the last value of a key that is there twice."""
    section = dict(pairs)
    if len(section) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        raise ValueError(f"{', '.join(map(repr, twice))} twice in one section")
    return section


def _refuse_odd_numbers(value: Any, where: str = "") -> None:
    """Refuse numbers that other programs' JSON, or 64 bits, cannot represent."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            _refuse_odd_numbers(item, f"{where}.{key}" if where else str(key))
    elif isinstance(value, int | float) and not -_MAX_NUMBER <= value <= _MAX_NUMBER:  # NaN fails both comparisons
        shown = str(value) if isinstance(value, float) or value.bit_length() < 200 else "one of very many digits"
        raise ValueError(f"{where}: expected a finite number of at most 2^62, got {shown}; change it")


def _check_deepspeed_values(section: Mapping[str, Any]) -> None:
    """Check the values' types before DeepSpeed fails on them.

    Raises:
        ValueError: a value does not fit; the message names its key.
    """
    for name, value in flattened(section, "deepspeed."):
        if value == "auto":
            raise ValueError(
                f'expected a value for {name}, got "auto", which the Trainer of transformers fills in and nothing here '
                "does; set a value, or remove the key for DeepSpeed's default"
            )
        if name.endswith(".enabled") and not isinstance(value, bool):
            raise ValueError(f"expected {name} to be true or false, got {value!r}; change it")
    for key, value in section.items():
        expected, is_number = _DEEPSPEED_KEYS[key], isinstance(value, int | float) and not isinstance(value, bool)
        fits = {
            "an object": isinstance(value, dict),
            "true or false": isinstance(value, bool),
            "a string": isinstance(value, str),
            "a whole number of at least 1": is_number and isinstance(value, int) and value >= 1,
            "a number of at least 0": is_number and value >= 0,
            "a number above 0": is_number and value > 0,
        }
        if not fits[expected]:
            example = ' such as {"enabled": true}' if key in ("bf16", "fp16", "torch_autocast") else ""
            raise ValueError(f"expected deepspeed.{key} to be {expected}{example}, got {value!r}; change or remove it")
    zero = section.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise ValueError(f"expected deepspeed.zero_optimization.stage 0, 1, 2 or 3, got {stage!r}; change it")


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Set a key of a configuration that is still a dictionary: `a.b=value`, as `load_config` does.

    Raises:
        ValueError: it is no such text, or its value cannot be read.
    """
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ValueError(f"--set expects KEY=VALUE such as proxies.ratio=0.1, got {override!r}")
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected a value in --set {key}=, got one that cannot be read: {error}; change it") from None
    *parents, last = key.split(".")
    section = raw
    for depth, parent in enumerate(parents):
        if section.get(parent) is None:  # a section that may be left out is null in the configuration of a run
            section[parent] = {}
        section = section[parent]
        if not isinstance(section, dict):
            raise ValueError(f"--set {override}: {'.'.join(parents[: depth + 1])} is a value, not a section")
    section[last] = value


def _explain(problem: typing.Mapping[str, Any]) -> str:
    location = tuple(part for part in problem["loc"])
    where = ".".join(str(part) for part in location) or "configuration"
    if problem["type"] == "extra_forbidden":
        known = _known_keys(Config, location[:-1])
        nearest = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.0)
        return f"{where}: unknown key; did you mean {nearest[0]!r}? known keys: {', '.join(known)}"
    if problem["type"] == "missing":
        return f"{where}: required, but missing"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{where}: {message}"
    return f"{where}: {message[0].lower()}{message[1:]}, got {problem['input']!r}"


def _known_keys(section: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    """Return the field names of the section that a validation error's location points into."""
    for part in location:
        candidates = (
            [s for s in _sections_of(section.model_fields[part].annotation)] if part in section.model_fields else []
        )
        if candidates:
            section = candidates[0]
            variants = candidates
        else:  # the tag of a discriminated union, e.g. data.train_transform.resize
            section = next(
                (s for s in variants if typing.get_args(s.model_fields["name"].annotation) == (part,)), section
            )
    return sorted(section.model_fields)


def _sections_of(annotation: Any) -> list[type[BaseModel]]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, Annotated):
        return [section for arg in typing.get_args(annotation) for section in _sections_of(arg)]
    return [annotation] if isinstance(annotation, type) and issubclass(annotation, BaseModel) else []
