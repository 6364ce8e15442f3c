"""Estimate of a run's time and memory from a few real training steps on this machine.

The steps are those of step.py, through DeepSpeed, with images from the run's own loader or, where there are no shards,
random ones that cost nothing to load. Two steps warm up. An evaluation is estimated from forward passes of a few
batches and a search for a block of queries; k-means from the same search, since its work is distances too. Nothing is
written. Weights are random, because loading pretrained ones would not change the times.

Declined: extrapolating to another number of ranks. Start it under deepspeed to measure several ranks.
"""

import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from dist_proxygml.config import Config
from dist_proxygml.data.pipeline import Batch, ImageCache
from dist_proxygml.distributed.gpus import set_arithmetic
from dist_proxygml.distributed.memory import format_bytes, peak_memory
from dist_proxygml.distributed.parallel import ParallelContext, all_gather_object, run_together
from dist_proxygml.evaluation.search import FlatIndex
from dist_proxygml.reporting.render import format_seconds
from dist_proxygml.training.data import TrainingData, open_training_data
from dist_proxygml.training.run_plan import RunPlan, has_index
from dist_proxygml.training.step import TrainState, build_train_state, train_step

_NUM_WARM_UP = 2
_NUM_EVALUATION_BATCHES = 3
_NUM_QUERIES, _MAX_GALLERY = 256, 20_000
_KMEANS_ITERATIONS = 25


@dataclass(frozen=True)
class Rehearsal:
    """Measurements, each of its slowest rank."""

    world_size: int
    device: str
    is_synthetic: bool  # random images: times exclude loading
    num_steps: int
    seconds_per_step: float
    images_per_second: float
    seconds_per_test_image: float  # of embedding, over all ranks
    seconds_per_multiplication: float  # per multiply-add of a search on one rank
    peak_bytes: int

    def evaluation_seconds(self, config: Config, *, num_images: int) -> float:
        """Estimate the time of an evaluation: embedding, exhaustive search, k-means."""
        dim = config.backbone.embedding_dim
        search = num_images * num_images * dim / self.world_size
        clusters = config.num_classes  # about the number of test classes, in every published split
        seeds_of_a_rank = math.ceil(config.evaluation.kmeans_seeds / self.world_size)  # a seed is not split over ranks
        kmeans = seeds_of_a_rank * _KMEANS_ITERATIONS * num_images * clusters * dim
        return num_images * self.seconds_per_test_image + (search + kmeans) * self.seconds_per_multiplication

    def describe(self, config: Config, plan: RunPlan) -> str:
        """Format the measurements, and the estimate of the run from the plan's counts, as a table."""
        images = "random images, loading not included" if self.is_synthetic else "the run's images"
        memory = "peak of GPU memory" if self.device == "cuda" else "peak of a process"
        rows = [
            ("one step", f"{1000 * self.seconds_per_step:,.1f} ms"),
            ("images per second", f"{self.images_per_second:,.0f}"),
            (memory, format_bytes(self.peak_bytes)),
        ]
        if plan.steps_per_epoch is not None:
            rows.append(("an epoch", format_seconds(plan.steps_per_epoch * self.seconds_per_step)))
        before = plan.num_class_mean_images * self.seconds_per_test_image
        whole = None if plan.num_steps is None else before + plan.num_steps * self.seconds_per_step
        if plan.num_test_images:
            evaluation = self.evaluation_seconds(config, num_images=plan.num_test_images)
            rows.append(("an evaluation, about", format_seconds(evaluation)))
            if whole is not None and plan.num_evaluations is not None:
                whole += plan.num_evaluations * evaluation
        if whole is not None:
            rows.append(("the run, about", format_seconds(whole)))
        table = "\n".join(f"  {name:<24}{value:>14}" for name, value in rows)
        where = f"{self.num_steps} steps on {self.world_size} rank(s) on {self.device}, {images}"
        return f"measured ({where}):\n{table}"


def rehearse(config: Config, context: ParallelContext, *, num_steps: int = 10) -> Rehearsal:
    """Train for a few steps and discard them. Called on all ranks.

    Raises:
        ValueError: on every rank, if the configuration does not fit the ranks or the shards are unusable.
    """
    config = config.model_copy(update={"backbone": config.backbone.model_copy(update={"pretrained": None})})
    set_arithmetic(config.training, context.device)
    is_there = config.data.stream is not None or has_index(config)
    data = run_together(context, open_training_data, config) if is_there else None
    state = build_train_state(config, context, steps_per_epoch=10**9 if data is None else data.count_steps())
    state.engine.module.train()
    batches = _random_batches(config, context) if data is None else _batches(data, context)

    def step() -> None:
        train_step(state, list(itertools.islice(batches, config.accumulation)), measure=False)
        state.consumed = 0

    for _ in range(_NUM_WARM_UP):
        step()
    _synchronise(context)
    start = time.perf_counter()
    for _ in range(num_steps):
        step()
    _synchronise(context)
    seconds = (time.perf_counter() - start) / num_steps

    peak = torch.cuda.max_memory_allocated(context.device) if context.device.type == "cuda" else peak_memory()
    measured = all_gather_object(context, (seconds, _embedding_seconds(state), _multiplication_seconds(config), peak))
    slowest = [max(values) for values in zip(*measured, strict=True)]
    return Rehearsal(
        world_size=context.world_size,
        device=context.device.type,
        is_synthetic=data is None,
        num_steps=num_steps,
        seconds_per_step=slowest[0],
        images_per_second=config.training.batch_size / slowest[0],
        seconds_per_test_image=slowest[1] / context.world_size,
        seconds_per_multiplication=slowest[2],
        peak_bytes=int(slowest[3]),
    )


def _batches(data: TrainingData, context: ParallelContext) -> Iterator[Batch]:
    """Yield this rank's batches, epoch after epoch."""
    cache = ImageCache() if data.config.data.cache_images else None
    for epoch in itertools.count():
        yield from data.loader(context, epoch=epoch, start=0, cache=cache)


def _random_batches(config: Config, context: ParallelContext) -> Iterator[Batch]:
    """Yield the same random images forever."""
    micro, side = config.micro_batch_size(context.world_size), config.data.train_transform.side
    generator = torch.Generator().manual_seed(context.rank)
    images = torch.randint(256, (micro, 3, side, side), dtype=torch.uint8, generator=generator)
    labels = torch.randint(config.num_trained_classes, (micro,), generator=generator)
    ids = torch.full((micro,), -1)
    while True:
        yield Batch(images, labels, ids, micro * context.world_size, config.training.batch_size)


@torch.no_grad()
def _embedding_seconds(state: TrainState) -> float:
    """Measure the seconds per image of a forward pass. Called on all ranks, with batches of equal size."""
    config, context, module = state.config, state.context, state.engine.module
    size, side = config.evaluation.batch_size, config.data.test_transform.side
    images = torch.randint(256, (size, 3, side, side), dtype=torch.uint8).to(context.device)
    module.eval()
    state.engine.module(images)
    _synchronise(context)
    start = time.perf_counter()
    for _ in range(_NUM_EVALUATION_BATCHES):
        state.engine.module(images)
    _synchronise(context)
    return (time.perf_counter() - start) / (_NUM_EVALUATION_BATCHES * size)


def _multiplication_seconds(config: Config) -> float:
    """Measure the seconds per multiply-add of an exhaustive search."""
    dim, num_rows = config.backbone.embedding_dim, _MAX_GALLERY
    rows = np.random.default_rng(0).standard_normal((num_rows, dim), dtype=np.float32)
    index = FlatIndex(rows)
    index.search(rows[:1], 10)
    start = time.perf_counter()
    index.search(rows[:_NUM_QUERIES], max(config.evaluation.recall_at) + 1)
    return (time.perf_counter() - start) / (_NUM_QUERIES * num_rows * dim)


def _synchronise(context: ParallelContext) -> None:
    if context.device.type == "cuda":
        torch.cuda.synchronize(context.device)
