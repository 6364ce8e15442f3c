"""Batches of images for one rank: a map-style dataset over shards, driven by the plan.

    plan (which ids) -> pread + crc32 -> decode -> transform (generators per sample) -> Batch

The DataLoader gets whole micro-batches from the plan and returns them in the plan's order whatever
the number of workers, so images are the same bit for bit for 0, 1 or 3 workers. What a random
transform does to an image depends on (seed, epoch, id) alone.

Chosen: map-style with own batches, because then exactly-once, equal steps and resume are
arithmetic.
Declined: WebDataset's iterable pipeline for training (its epoch depends on shards, ranks and
workers) and persistent workers (they keep a transform's old epoch).
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from dist_proxygml.data.images import decode_image
from dist_proxygml.data.index import ShardIndex
from dist_proxygml.data.plan import EpochPlan, MicroBatch, epoch_order, evaluation_batches
from dist_proxygml.data.shards import ShardReader
from dist_proxygml.data.transforms import Transform


class Batch(NamedTuple):
    """The images of one rank in one micro-step.

    A step's micro-batches may differ in size (a short last step), so the mean over a micro-batch
    counts `global_size * accumulation / step_size` times for the mean over the step; that factor is
    1 in every full step.
    """

    images: torch.Tensor  # uint8 RGB [b, 3, H, W]
    labels: torch.Tensor  # int64 [b]
    ids: torch.Tensor  # int64 [b]: positions in the split's index
    global_size: int  # images of this micro-step over all ranks
    step_size: int  # images of the whole optimizer step over all micro-steps and ranks

    def loss_weight(self, accumulation: int) -> float:
        """The factor on this micro-batch's mean loss when `accumulation` gradients are averaged."""
        return self.global_size * accumulation / self.step_size


class ImageCache:
    """Decoded images of one split kept in memory, one uint8 array an image.

    Make one and pass it to the loaders of every epoch.
    """

    def __init__(self) -> None:
        self._images: dict[int, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self._images)

    def get(self, sample_id: int) -> torch.Tensor | None:
        """The image [3, h, w] of a sample, or None."""
        return self._images.get(sample_id)

    def put(self, sample_id: int, image: torch.Tensor) -> None:
        """Keep the image of a sample."""
        self._images[sample_id] = image


class _Failure(NamedTuple):
    """A ValueError on its way from a worker; a DataLoader would wrap its text in a traceback."""

    message: str


class ShardImages(Dataset[Batch]):
    """The images of one split by id. Indexed with a whole micro-batch at a time."""

    def __init__(
        self,
        index: ShardIndex,
        transform: Transform,
        *,
        seed: int = 0,
        epoch: int = 0,
        cache: ImageCache | None = None,
    ) -> None:
        self.index = index
        self.transform = transform
        self.seed = seed
        self.epoch = epoch
        self.cache = cache
        self.reader = ShardReader(index.shard_paths)

    def __len__(self) -> int:
        return self.index.num_samples

    def image(self, sample_id: int) -> torch.Tensor:
        """A decoded image before any transform, uint8 RGB [3, h, w].

        Raises ValueError naming the shard, the sample and the reason when its bytes changed or do
        not decode.
        """
        if self.cache is not None and (kept := self.cache.get(sample_id)) is not None:
            return kept
        row = self.index.samples[sample_id]
        try:
            image = decode_image(
                self.reader.read(
                    int(row["shard"]),
                    offset=int(row["offset"]),
                    num_bytes=int(row["nbytes"]),
                    crc32=int(row["crc32"]),
                )
            )
        except ValueError as problem:
            raise ValueError(
                f"{self.index.describe(sample_id)}: {problem}; "
                f"look with `python -m dist_proxygml.shard verify --deep {self.index.root}`, then "
                "copy or build the shard again"
            ) from problem
        if self.cache is not None:
            self.cache.put(sample_id, image)
        return image

    def batch(self, micro_batch: MicroBatch) -> Batch:
        """Read, decode and transform the images of a micro-batch."""
        ids = micro_batch.ids
        images = [self.image(int(sample_id)) for sample_id in ids]
        generators = [sample_generator(seed=self.seed, epoch=self.epoch, sample_id=int(sample_id)) for sample_id in ids]
        labels_b = torch.from_numpy(self.index.samples["label"][ids].astype(np.int64))
        ids_b = torch.from_numpy(np.array(ids, dtype=np.int64))
        return Batch(
            self.transform(images, generators),
            labels_b,
            ids_b,
            micro_batch.global_size,
            micro_batch.step_size,
        )

    def __getitems__(self, micro_batch: MicroBatch) -> Batch | _Failure:
        try:
            return self.batch(micro_batch)
        except ValueError as problem:
            return _Failure(str(problem))


def sample_generator(*, seed: int, epoch: int, sample_id: int) -> np.random.Generator:
    """All randomness of one image in one epoch: Philox with key (seed, epoch) and counter id."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, 0, 0, sample_id]))


class BatchLoader:
    """An iterable of `Batch`. Iterating again gives the same batches again."""

    def __init__(
        self,
        dataset: ShardImages,
        micro_batches: Sequence[MicroBatch],
        *,
        num_workers: int,
        num_steps: int,
        pin_memory: bool,
    ) -> None:
        if num_workers and dataset.cache is not None:
            raise ValueError(
                f"an image cache needs num_workers 0, got {num_workers}: each worker would fill "
                "its own and lose it at the end of the "
                f"epoch; set num_workers to 0 or cache_images to false"
            )
        self.dataset = dataset
        self.num_steps = num_steps
        self._micro_batches = micro_batches
        # Its own generator: a DataLoader otherwise draws a seed from the global one, and so changes
        # what comes after it.
        self._loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_sampler=micro_batches,  # type: ignore[arg-type]  # any sequence of indices of __getitems__
            num_workers=num_workers,
            collate_fn=_unchanged,
            pin_memory=pin_memory,
            generator=torch.Generator(),
        )

    def __len__(self) -> int:
        return len(self._micro_batches)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._loader:
            if isinstance(batch, _Failure):
                raise ValueError(batch.message)
            yield batch


def _unchanged(batch: Any) -> Any:
    return batch


def build_train_loader(
    index: ShardIndex,
    transform: Transform,
    *,
    batch_size: int,
    accumulation: int = 1,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    epoch: int = 0,
    start_step: int = 0,
    num_workers: int = 0,
    shuffle_window: int | None = None,
    drop_last: bool = False,
    cache: ImageCache | None = None,
    pin_memory: bool = False,
) -> BatchLoader:
    """One epoch of shuffled training batches of a rank, from step `start_step` on.

    There are `accumulation` batches a step. `batch_size` counts the images of one optimizer step
    over all ranks and micro-batches. `num_steps` of the result is the number of steps of the whole
    epoch, the same on every rank. Raises ValueError when batch_size does not divide into ranks x
    micro-batches, or start_step lies beyond the epoch.
    """
    order = epoch_order(index.samples["shard"], seed=seed, epoch=epoch, shuffle_window=shuffle_window)
    plan = EpochPlan(order, batch_size, accumulation, world_size, drop_last)
    if not 0 <= start_step <= plan.num_steps:
        raise ValueError(
            f"start_step must lie in [0, {plan.num_steps}], got {start_step}; the epoch has {plan.num_steps} steps"
        )
    return BatchLoader(
        ShardImages(index, transform, seed=seed, epoch=epoch, cache=cache),
        _RankBatches(plan, rank, start_step),
        num_workers=num_workers,
        num_steps=plan.num_steps,
        pin_memory=pin_memory,
    )


def build_evaluation_loader(
    index: ShardIndex,
    transform: Transform,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    cache: ImageCache | None = None,
    pin_memory: bool = False,
) -> BatchLoader:
    """All images of a split in the order of their ids, every one on exactly one rank.

    Batches are cut at multiples of `batch_size`; a rank may have none. `num_steps` is the number of
    this rank's batches.
    """
    batches = [
        MicroBatch(ids, len(ids), len(ids))
        for ids in evaluation_batches(index.num_samples, batch_size=batch_size, rank=rank, world_size=world_size)
    ]
    dataset = ShardImages(index, transform, cache=cache)
    return BatchLoader(dataset, batches, num_workers=num_workers, num_steps=len(batches), pin_memory=pin_memory)


class _RankBatches(Sequence[MicroBatch]):
    """The micro-batches of one rank, cut when they are asked for."""

    def __init__(self, plan: EpochPlan, rank: int, start_step: int) -> None:
        if not 0 <= rank < plan.world_size:
            raise ValueError(f"rank must lie in [0, {plan.world_size}), got {rank}")
        self.plan = plan
        self.rank = rank
        self.start_step = start_step

    def __len__(self) -> int:
        return (self.plan.num_steps - self.start_step) * self.plan.accumulation

    def __getitem__(self, position: int) -> MicroBatch:  # type: ignore[override]  # positions only, no slices
        if not 0 <= position < len(self):
            raise IndexError(position)
        step, micro_step = divmod(position, self.plan.accumulation)
        return self.plan.micro_batch(self.start_step + step, micro_step, self.rank)
