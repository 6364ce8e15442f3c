"""Resources of a run besides its head: steps, the backbone's memory, embeddings to search, checkpoints on disk.

Numbers of images come from the index of the shards; while that is missing, from the literature for the data sets of
the published configurations; otherwise they are unknown. Activations are in no formula here: rehearsal.py measures
them.

The backbone by ZeRO stage, P numbers of which T are trained, over W ranks (Rajbhandari et al. 2020, section 3):

    weights    P * w             divided by W from stage 3
    gradients  T * w             divided by W from stage 2
    optimizer  T * (8 + master)  divided by W from stage 1
    average    T * 4             divided by W from stage 1; with training.ema_decay

w is 4 bytes, or 2 with deepspeed.bf16 or fp16, which keep a float32 master copy of 4 bytes; Adam's two moments are
float32. Buckets and fragmentation come on top.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dist_proxygml.backbones.build import build_backbone
from dist_proxygml.backbones.lora import add_adapters_
from dist_proxygml.config import Config
from dist_proxygml.data.datasets import PUBLISHED_COUNTS
from dist_proxygml.data.index import INDEX_FILE
from dist_proxygml.data.remote import is_remote
from dist_proxygml.distributed.memory import format_bytes
from dist_proxygml.training.data import TrainingData, open_split, open_training_data
from dist_proxygml.training.head_plan import HeadPlan

_MOMENTS = 8  # bytes of Adam's two moments per parameter


@dataclass(frozen=True)
class BackboneMemory:
    """Bytes of the backbone on one rank."""

    weights: int
    gradients: int
    optimizer: int
    average: int = 0

    @property
    def total(self) -> int:
        """The sum, without activations."""
        return self.weights + self.gradients + self.optimizer + self.average


@dataclass(frozen=True)
class RunPlan:
    """Resources of a run besides its head; None where the number of images is unknown."""

    source: str
    """Source of the numbers of images, or why they are unknown."""
    steps_per_epoch: int | None
    num_steps: int | None
    num_evaluations: int | None
    num_test_images: int | None
    num_class_mean_images: int
    """Images that class means are taken of before the first step, or an upper bound; 0 without."""
    gallery_bytes: int | None
    """Embeddings of the test images, float32."""
    num_parameters: int
    num_trained: int
    backbone: BackboneMemory
    evaluated_bytes: int
    """The backbone that is evaluated, beside the one that is trained; 0 if they are the same."""
    checkpoint_bytes: int
    num_checkpoints: int
    """Maximum number on disk at a time, including the one being written."""
    runs_dir: str
    free_bytes: int

    @property
    def needed_bytes(self) -> int:
        """Disk space for checkpoints."""
        return self.checkpoint_bytes * self.num_checkpoints

    @property
    def shortage_message(self) -> str:
        """Error message for checkpoints that need more space than is free."""
        return (
            f"expected room for {self.num_checkpoints} checkpoints of {format_bytes(self.checkpoint_bytes)}, together "
            f"{format_bytes(self.needed_bytes)}, got {format_bytes(self.free_bytes)} in {self.runs_dir}; lower "
            "checkpoint.keep_last, raise checkpoint.keep_every, or set runs_dir to a folder on a larger disk"
        )

    def __str__(self) -> str:
        """Format the plan as a table."""

        def number(value: int | None) -> str:
            return "unknown" if value is None else f"{value:,}"

        size = "unknown" if self.gallery_bytes is None else format_bytes(self.gallery_bytes)
        sections = {
            f"plan of the run ({self.source})": [
                ("steps per epoch", number(self.steps_per_epoch)),
                ("steps", number(self.num_steps)),
                ("evaluations", number(self.num_evaluations)),
                ("evaluated images", number(self.num_test_images)),
                *([("images of class means", number(self.num_class_mean_images))] * (self.num_class_mean_images > 0)),
                ("backbone parameters", number(self.num_parameters)),
                *([("trained of them", number(self.num_trained))] if self.num_trained < self.num_parameters else []),
            ],
            "memory of the backbone, per rank, without activations": [
                ("weights", format_bytes(self.backbone.weights)),
                ("gradients", format_bytes(self.backbone.gradients)),
                ("optimizer state", format_bytes(self.backbone.optimizer)),
                *([("averaged weights", format_bytes(self.backbone.average))] if self.backbone.average else []),
                ("together", format_bytes(self.backbone.total)),
                *(
                    [("in an evaluation: backbone", format_bytes(self.evaluated_bytes))]
                    if self.backbone.average
                    else []
                ),
                ("in an evaluation: embeddings", size),
            ],
            f"disk, in {self.runs_dir}": [
                ("a checkpoint", format_bytes(self.checkpoint_bytes)),
                ("checkpoints", f"{self.num_checkpoints} at most"),
                ("together", format_bytes(self.needed_bytes)),
                ("left", format_bytes(self.free_bytes)),
            ],
        }
        return "\n".join(
            "\n".join([f"{title}:", *(f"  {name:<30}{value:>14}" for name, value in rows)])
            for title, rows in sections.items()
        )


def plan_run(config: Config, *, world_size: int, bank_bytes: int) -> RunPlan:
    """Predict the resources of `config` on `world_size` ranks.

    `bank_bytes` are the bytes of the proxy bank with its optimizer state over all ranks, as a checkpoint holds them.

    Raises:
        ValueError: the shards exist but are unusable, or the backbone cannot be built.
    """
    source, steps_per_epoch, num_test, num_class_mean = _counts(config)
    training, evaluation, keep = config.training, config.evaluation, config.checkpoint
    num_steps = training.max_steps if steps_per_epoch is None else steps_per_epoch * training.epochs
    if num_steps is not None and training.max_steps is not None:
        num_steps = min(num_steps, training.max_steps)
    num_evaluations = None
    if not config.is_evaluated:
        num_evaluations = 0
    elif steps_per_epoch is not None and num_steps is not None:
        between = (num_steps - 1) // steps_per_epoch // evaluation.every_epochs if evaluation.every_epochs else 0
        num_evaluations = int(evaluation.at_start) + between + 1

    num_parameters, num_trained = _count_parameters(config)
    memory = plan_backbone(config, num_parameters=num_parameters, num_trained=num_trained, world_size=world_size)
    whole = plan_backbone(config, num_parameters=num_parameters, num_trained=num_trained, world_size=1)
    evaluated = 4 * num_parameters if training.ema_decay is not None else 0  # float32
    kept = keep.keep_last + (keep.keep_best is not None and config.is_evaluated)
    if keep.keep_every is not None and num_steps is not None:
        kept += num_steps // keep.keep_every
    return RunPlan(
        source=source,
        steps_per_epoch=steps_per_epoch,
        num_steps=num_steps,
        num_evaluations=num_evaluations,
        num_test_images=num_test,
        num_class_mean_images=num_class_mean,
        gallery_bytes=None if num_test is None else num_test * config.backbone.embedding_dim * 4,
        num_parameters=num_parameters,
        num_trained=num_trained,
        backbone=memory,
        evaluated_bytes=evaluated,
        # the engine's weights and optimizer, the bank with its own, the evaluated backbone as safetensors
        checkpoint_bytes=whole.weights + whole.optimizer + bank_bytes + (evaluated or whole.weights),
        num_checkpoints=kept + 1,
        runs_dir=config.runs_dir,
        free_bytes=shutil.disk_usage(_existing(config.run_directory)).free,
    )


def plan_backbone(config: Config, *, num_parameters: int, num_trained: int, world_size: int) -> BackboneMemory:
    """Compute the bytes of the backbone on one rank, by the formula above."""
    stage = config.deepspeed.get("zero_optimization", {}).get("stage", 0)
    is_half = any(config.deepspeed.get(section, {}).get("enabled", False) for section in ("bf16", "fp16"))
    width, master = (2, 4) if is_half else (4, 0)

    def share(num_bytes: int, first_stage: int) -> int:
        return -(-num_bytes // world_size) if stage >= first_stage else num_bytes

    return BackboneMemory(
        weights=share(num_parameters * width, 3),
        gradients=share(num_trained * width, 2),
        optimizer=share(num_trained * (_MOMENTS + master), 1),
        average=0 if config.training.ema_decay is None else share(num_trained * 4, 1),
    )


def _count_parameters(config: Config) -> tuple[int, int]:
    """Count all and trained parameters of the backbone; the random generator is unchanged."""
    with torch.random.fork_rng(devices=[]):
        model = build_backbone(config.backbone, load_pretrained=False)
        if config.backbone.lora is not None:
            add_adapters_(model, config.backbone.lora)
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, is_trained in sizes if is_trained)


def has_index(config: Config) -> bool:
    """Whether the index exists, or is remote and will be fetched."""
    return is_remote(config.data.shards) or (Path(config.data.shards) / INDEX_FILE).is_file()


def _counts(config: Config) -> tuple[str, int | None, int | None, int]:
    """Return the source of the counts, steps per epoch, images that an evaluation embeds, images of class means."""
    shards, proxies = config.data.shards, config.proxies
    of_class = proxies.class_mean_images if proxies.initialization == "class_mean" else 0
    num_means = of_class * config.num_classes  # at most
    if has_index(config):
        train = None if config.data.stream is not None else open_split(config, config.data.train_split)
        if train is None or train.num_classes == config.num_classes:
            data = open_training_data(config)
            if data.index is not None:
                num_means = int(np.bincount(data.index.labels).clip(max=of_class).sum())
        else:  # a plan may explore a larger number of classes
            data = TrainingData(config, train)
        splits = [config.data.test_split, config.evaluation.gallery_split]
        num_test = sum(open_split(config, split).num_samples for split in splits if split is not None)
        num_test += 0 if data.validation is None else data.validation.num_samples
        return f"counts of {shards}", data.count_steps(), num_test, num_means
    missing = f"{shards}/{INDEX_FILE} is not there"
    published = PUBLISHED_COUNTS.get(Path(shards).name, {})
    num_train, num_classes = published.get("train", (0, 0))
    if config.data.stream is not None:
        return f"{missing}: no test images", TrainingData(config, None).count_steps(), None, num_means
    if num_classes != config.data.num_classes or "test" not in published:
        return f"{missing}: build the shards for numbers of steps and test images", None, None, num_means
    batch_size = config.training.batch_size
    is_dropped = config.data.drop_last or config.data.images_per_class is not None
    steps = num_train // batch_size if is_dropped else -(-num_train // batch_size)
    num_test = published["test"][0] if config.data.test_split else 0
    return f"{missing}: published counts of {Path(shards).name}", max(1, steps), num_test, num_means


def _existing(folder: Path) -> Path:
    """Return the folder, or its nearest ancestor that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def describe_plans(config: Config, plan: HeadPlan) -> str:
    """Format the tables of the head and of the rest of the run.

    Raises:
        ValueError: the shards exist but are unusable, or the backbone cannot be built.
    """
    return f"{plan}\n{plan_rest(config, plan)}"


def plan_rest(config: Config, plan: HeadPlan) -> RunPlan:
    """Predict everything but the head: as `plan_run`, for the bank of a head's plan."""
    stored = plan.bank_bytes + plan.optimizer_bytes
    if plan.num_own_proxies:  # otherwise every rank has a copy of all, of which one is written
        stored = plan.num_proxies * stored // plan.num_own_proxies
    return plan_run(config, world_size=plan.world_size, bank_bytes=stored)
