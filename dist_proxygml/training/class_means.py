"""Initialise proxies from class means: the mean embedding of each class's images under the initial backbone."""

import sys

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from dist_proxygml.data.damage import Damage, DamageLog
from dist_proxygml.data.index import ShardIndex
from dist_proxygml.data.pipeline import Batch, build_evaluation_loader
from dist_proxygml.data.transforms import build_transform
from dist_proxygml.head.proxies import replace_by_class_means_
from dist_proxygml.reporting.telemetry import Telemetry
from dist_proxygml.training.evaluate import backbone_of_one_rank
from dist_proxygml.training.step import TrainState


def start_from_class_means(
    state: TrainState, index: ShardIndex, telemetry: Telemetry, damage: DamageLog | None = None
) -> None:
    """Set each class's proxies to the mean embedding of its images under the state's backbone. Called on all ranks.

    One pass over `proxies.class_mean_images` random images of each class with the test transform, in evaluation mode;
    see `replace_by_class_means_`. Damaged images are skipped, and counted in `damage` if given.

    Raises:
        ValueError: on every rank, if an image is damaged, or too many are, or an embedding is not finite.
    """
    config, context = state.config, state.context
    ids = some_of_each_class(index.labels, config.proxies.class_mean_images, seed=config.seed)
    telemetry.say(
        f"class means: {len(ids):,} of {index.num_samples:,} images of {index.num_classes:,} classes through the "
        "initial backbone"
    )
    loader = build_evaluation_loader(
        index,
        build_transform(config.data.test_transform),
        batch_size=config.evaluation.batch_size,
        rank=context.rank,
        world_size=context.world_size,
        num_workers=config.data.num_workers,
        pin_memory=context.device.type == "cuda",
        skip_damaged=damage is not None,
        only_ids=ids,
    )
    model = backbone_of_one_rank(state)
    left_out: list[Damage] = []

    def embedded(batch: Batch) -> tuple[Tensor, Tensor]:
        left_out.extend(batch.damaged)
        if len(batch.ids) == 0:
            return torch.zeros(0, config.backbone.embedding_dim, device=context.device), batch.labels.to(context.device)
        return _embedded(model, batch, context.device)

    was_training = model.training
    model.eval()
    # Progress of rank 0's share of the batches: a line every 15 seconds in a file, a bar in a terminal.
    with tqdm(
        loader,
        desc="class means",
        unit="batch",
        disable=not (context.is_main and config.telemetry.progress_bar),
        leave=False,
        mininterval=0.5 if sys.stderr.isatty() else 15.0,
    ) as batches:
        replace_by_class_means_(
            state.bank.proxies.detach(),
            (embedded(batch) for batch in batches),
            num_batches=len(loader),
            partition=state.bank.partition,
            context=context,
        )
    model.train(was_training)
    if damage is not None:
        damage.add(left_out)


def some_of_each_class(labels_n: np.ndarray, most: int, *, seed: int) -> np.ndarray:
    """Return the ids of up to `most` images of each class, drawn at random: positions in the labels, ascending."""
    ids_n = np.random.default_rng(seed).permutation(len(labels_n))
    ids_n = ids_n[np.argsort(labels_n[ids_n], kind="stable")]  # class by class
    count_c = np.bincount(labels_n)
    taken_c = count_c.clip(max=most)
    first_c, first_taken_c = count_c.cumsum() - count_c, taken_c.cumsum() - taken_c
    return np.sort(ids_n[np.arange(taken_c.sum()) + np.repeat(first_c - first_taken_c, taken_c)])


@torch.no_grad()
def _embedded(model: nn.Module, batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return a batch's embeddings, float32 [b, D] unit rows, and labels [b], on the device."""
    embeddings_bD = model(batch.images.to(device, non_blocking=True))
    return F.normalize(embeddings_bD.float(), dim=1), batch.labels.to(device, non_blocking=True)
