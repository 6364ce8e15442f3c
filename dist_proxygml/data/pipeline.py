"""Batches of images for one rank: a map-style dataset over shards, driven by a plan.

    plan (which ids) -> pread + crc32 -> decode -> transform (generators per sample) -> Batch

The DataLoader gets whole micro-batches from the plan and returns them in the plan's order for any
number of workers, so images are bit-for-bit the same for 0, 1 or 3 workers. A random transform of
an image depends on (seed, epoch, id) alone, and on how often the epoch had the image before where
orders repeat images to see them augmented anew; the replacement of a damaged image depends on
(seed, epoch, id), so positions never shift.

Chosen: map-style with own batches, because exactly-once, equal steps and resuming are then
arithmetic.
Declined: WebDataset's iterable pipeline for training (its epoch depends on shards, ranks and
workers) and persistent workers (they keep a transform's old epoch).
"""

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch.utils.data import Dataset

from dist_proxygml.data.damage import Damage
from dist_proxygml.data.images import decode_image
from dist_proxygml.data.index import ShardIndex
from dist_proxygml.data.order import (
    EpochPlan,
    MicroBatch,
    class_balanced_order,
    class_share_order,
    count_earlier,
    epoch_order,
    evaluation_batches,
    repeated_order,
)
from dist_proxygml.data.shards import ShardReader, ShardUnavailableError
from dist_proxygml.data.transforms import Transform
from dist_proxygml.data.workers import WorkerLoader, ready_to_leave

Decoded = TypeVar("Decoded")


class Batch(NamedTuple):
    """Images of one rank in one micro-step.

    A step's micro-batches may differ in size (a short last step), so the mean over a micro-batch
    counts `global_size * accumulation / step_size` times for the mean over the step; that factor is
    1 in every full step.
    """

    images: torch.Tensor  # uint8 RGB [b, 3, H, W]
    labels: torch.Tensor  # int64 [b]
    ids: torch.Tensor  # int64 [b]: positions in the split's index; -1 in a stream, which has none
    global_size: int  # images of this micro-step over all ranks
    step_size: int  # images of the whole optimizer step over all micro-steps and ranks
    damaged: tuple[Damage, ...] = ()  # images that belong here but could not be used

    def loss_weight(self, accumulation: int) -> float:
        """Return the factor on this micro-batch's mean loss when `accumulation` gradients are averaged."""
        return self.global_size * accumulation / self.step_size


class ImageCache:
    """Decoded images of one split in memory, one uint8 array per image.

    Create one and pass it to the loaders of every epoch.
    """

    def __init__(self) -> None:
        self._images: dict[int, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self._images)

    def get(self, sample_id: int) -> torch.Tensor | None:
        """Return the image [3, h, w] of a sample, or None."""
        return self._images.get(sample_id)

    def put(self, sample_id: int, image: torch.Tensor) -> None:
        """Store the image of a sample."""
        self._images[sample_id] = image


# Candidates to replace a damaged image: of its class, then of any.
_NUM_TRIED = 100


class _Failure(NamedTuple):
    """A ValueError on its way from a worker; a DataLoader would wrap its text in a traceback."""

    message: str


class BatchSource(Protocol):
    """Source of a BatchLoader's batches."""

    cache: ImageCache | None

    def __getitems__(self, micro_batch: MicroBatch) -> tuple[Any, ...] | _Failure:
        """Return a batch in a form that leaves a worker, see `sent`."""


def sent(make: Callable[[MicroBatch], Batch], micro_batch: MicroBatch) -> tuple[Any, ...] | _Failure:
    """Make a batch, or catch its ValueError, in a form that is cheap to send from a worker."""
    try:
        images, labels, ids, *rest = make(micro_batch)
        images = ready_to_leave(images)
    except ValueError as problem:
        return _Failure(str(problem))
    # As arrays: a small tensor costs a file descriptor and shared memory when sent from a worker.
    return (images, labels.numpy(), ids.numpy(), *rest)


@dataclass(eq=False)
class ShardImages(Dataset[Batch]):
    """Images of one split by id, indexed by whole micro-batches.

    `damaged` determines what happens to an unusable image: "fail" raises, "replace" substitutes another image of its
    class (of any class if it has no other), "leave_out" gives a smaller batch.
    """

    index: ShardIndex
    transform: Transform
    seed: int = field(default=0, kw_only=True)
    epoch: int = field(default=0, kw_only=True)
    cache: ImageCache | None = field(default=None, kw_only=True)
    damaged: Literal["fail", "replace", "leave_out"] = field(default="fail", kw_only=True)

    def __post_init__(self) -> None:
        self.reader = ShardReader(self.index.open_shard)

    def __len__(self) -> int:
        return self.index.num_samples

    def image(self, sample_id: int) -> torch.Tensor:
        """Decode an image without transforming it, uint8 RGB [3, h, w].

        Raises ValueError naming the shard, the sample and the reason if its bytes changed or do not
        decode.
        """
        if self.cache is not None and (kept := self.cache.get(sample_id)) is not None:
            return kept
        image = self.read(sample_id, partial(decode_image, upright=self.index.upright))
        if self.cache is not None:
            self.cache.put(sample_id, image)
        return image

    def read(self, sample_id: int, decode: Callable[[bytes], Decoded]) -> Decoded:
        """Apply `decode` to the image file of a sample. Raises ValueError as `image`."""
        try:
            payload = self._read(sample_id)
        except ShardUnavailableError as problem:
            shard = self.index.shards[self.index.samples["shard"][sample_id]].file
            raise ShardUnavailableError(f"{self.index.location}/{shard}: {problem}") from problem
        except ValueError as problem:
            remedy = "upload the shards and their index again"
            if self.index.remote is None:
                look = f"python -m dist_proxygml.shard verify --deep {self.index.root}"
                remedy = f"look with `{look}`, then copy or build the shard again"
            raise ValueError(f"{self.index.describe(sample_id)}: {problem}; {remedy}") from problem
        try:
            return decode(payload)
        except ValueError as problem:  # its bytes are those of the index
            remedy = (
                "it was so before its shard was built: repair or remove the file that it was made of and build again, "
                'build with `--on-bad skip`, or set data.damaged_images to "skip"'
            )
            raise ValueError(f"{self.index.describe(sample_id)}: {problem}; {remedy}") from problem

    def _read(self, sample_id: int) -> bytes:
        """Read the image file of a sample. A damaged local copy of a remote shard is fetched once more."""
        shard, _, offset, num_bytes, crc32 = self.index.samples[sample_id].item()
        try:
            return self.reader.read(shard, offset=offset, num_bytes=num_bytes, crc32=crc32)
        except ShardUnavailableError:
            raise
        except ValueError:
            if not self.index.drop_damaged_copy(shard):
                raise
            self.reader.close()
            return self.reader.read(shard, offset=offset, num_bytes=num_bytes, crc32=crc32)

    def batch(self, micro_batch: MicroBatch) -> Batch:
        """Read, decode and transform the images of a micro-batch.

        Raises ValueError as `image` does if damaged images fail, or if no replacement can be read.
        """
        ids, images, visits, damaged = [], [], [], []
        earlier = itertools.repeat(0) if micro_batch.visits is None else micro_batch.visits.tolist()
        for wanted, visit in zip(micro_batch.ids.tolist(), earlier, strict=False):
            try:
                image, sample_id = self.image(wanted), wanted
            except ShardUnavailableError:
                raise  # under any policy: its images are not damaged
            except ValueError as problem:
                if self.damaged == "fail":
                    raise
                damaged.append(Damage(self.index.describe(wanted), str(problem.__cause__)))
                if self.damaged == "leave_out":
                    continue
                image, sample_id = self._replacement(wanted, str(problem))
            ids.append(sample_id)
            images.append(image)
            visits.append(visit)
        generators = sample_generators(ids, seed=self.seed, epoch=self.epoch, visits=visits)
        ids_b = torch.tensor(ids, dtype=torch.int64)
        labels_b = torch.from_numpy(self.index.samples["label"][ids_b.numpy()].astype(np.int64))
        images_b3HW = self.transform(images, generators) if images else torch.zeros(0, 3, 1, 1, dtype=torch.uint8)
        return Batch(images_b3HW, labels_b, ids_b, micro_batch.global_size, micro_batch.step_size, tuple(damaged))

    def _replacement(self, sample_id: int, problem: str) -> tuple[torch.Tensor, int]:
        """Find a readable image of the same class, otherwise of any class; return it and its id."""
        draw = next(sample_generators([sample_id], seed=self.seed, epoch=self.epoch))
        labels = self.index.samples["label"]
        same_class = np.flatnonzero(labels == labels[sample_id])
        any_class = draw.integers(0, len(labels), _NUM_TRIED)
        for candidate in [*draw.permutation(same_class)[:_NUM_TRIED].tolist(), *any_class.tolist()]:
            try:
                return self.image(candidate), candidate
            except ShardUnavailableError:
                raise
            except ValueError:
                continue
        raise ValueError(f"{problem}; no other image of its class, and none of {len(any_class)} others, can be read")

    def __getitems__(self, micro_batch: MicroBatch) -> tuple[Any, ...] | _Failure:
        return sent(self.batch, micro_batch)


def sample_generators(
    ids: Sequence[int], *, seed: int, epoch: int, visits: Iterable[int] = itertools.repeat(0)
) -> Iterator[np.random.Generator]:
    """Yield the random generator of each image in an epoch: Philox with key (seed, epoch) and counter (visit, id).

    A single generator is reset to each image's stream, because creating one costs more than its draws.
    """
    philox = np.random.Philox(key=[seed, epoch])
    generator, fresh = np.random.Generator(philox), philox.state
    for sample_id, visit in zip(ids, visits, strict=False):
        fresh["state"]["counter"][2:] = visit, sample_id
        philox.state = fresh
        yield generator


class BatchLoader:
    """An iterable of `Batch`; each iteration gives the same batches."""

    def __init__(
        self,
        dataset: BatchSource,
        micro_batches: Sequence[MicroBatch],
        *,
        num_workers: int,
        num_steps: int,
        pin_memory: bool,
    ) -> None:
        assert num_workers == 0 or dataset.cache is None, "the configuration refuses a cache with workers"
        self.dataset = dataset
        self.num_steps = num_steps
        self._micro_batches = micro_batches
        self._pin_memory = pin_memory
        self._loader = WorkerLoader(
            dataset,
            num_workers=num_workers,
            batch_sampler=micro_batches,  # any sequence of indices of __getitems__
            collate_fn=_unchanged,
            pin_memory=pin_memory,
        )

    def __len__(self) -> int:
        return len(self._micro_batches)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._loader:
            if isinstance(batch, _Failure):
                raise ValueError(batch.message)
            images, labels, ids, *rest = batch
            labels = torch.from_numpy(labels)  # which left the worker as an array, so nobody has pinned it
            yield Batch(images, labels.pin_memory() if self._pin_memory else labels, torch.from_numpy(ids), *rest)


def _unchanged(batch: Any) -> Any:
    return batch


@dataclass(frozen=True)
class EpochOrder:
    """Which images one training epoch visits, and in which order; the same on every rank.

    Attributes:
        batch_size: images of one optimizer step over all ranks and micro-batches.
        seed, epoch: of the shuffle, and of what augmentation does.
        shuffle_window: shards that mix at a time; None: all.
        images_per_class: class-balanced batches with so many images of each class; None: every image once.
        sampling_power: a class of s images is drawn in proportion to s to this power; None: every image once.
        num_copies: of each image in a step, augmented differently (repeated augmentation).
    """

    batch_size: int
    seed: int = 0
    epoch: int = 0
    shuffle_window: int | None = None
    images_per_class: int | None = None
    sampling_power: float | None = None
    num_copies: int = 1

    @property
    def has_repeats(self) -> bool:
        """Whether an image may come again in an epoch, to be augmented anew."""
        return self.sampling_power is not None or self.num_copies > 1

    def of(self, index: ShardIndex) -> np.ndarray:
        """The ids, int64. Raises ValueError when the split has too few classes for a balanced batch, or too few images
        for the copies.
        """
        if self.num_copies > 1:
            epoch, part = divmod(self.epoch, self.num_copies)
            whole = replace(self, epoch=epoch, num_copies=1).of(index)
            return repeated_order(whole, num_copies=self.num_copies, part=part)
        if self.sampling_power is not None:
            return class_share_order(
                index.samples["label"], power=self.sampling_power, seed=self.seed, epoch=self.epoch
            )
        if self.images_per_class is None:
            shards = index.samples["shard"]
            return epoch_order(shards, seed=self.seed, epoch=self.epoch, shuffle_window=self.shuffle_window)
        assert self.batch_size % self.images_per_class == 0, "the configuration refuses such a batch"
        return class_balanced_order(
            index.samples["label"],
            classes_per_batch=self.batch_size // self.images_per_class,
            images_per_class=self.images_per_class,
            seed=self.seed,
            epoch=self.epoch,
        )


@dataclass(frozen=True)
class RankShare:
    """Whose part of it is loaded, and from where on.

    Attributes:
        rank, world_size: this rank among those that share each batch.
        accumulation: micro-batches of a step.
        start: images of the epoch's order that are done.
        drop_last: leave out the short last step.
    """

    rank: int = 0
    world_size: int = 1
    accumulation: int = 1
    start: int = 0
    drop_last: bool = False


@dataclass(frozen=True)
class Loading:
    """How images get into memory; no image depends on it, damaged ones excepted.

    Attributes:
        num_workers: loading processes; 0 loads in this one.
        cache: keeps decoded images; with `num_workers` 0 only.
        pin_memory: into memory that a GPU copies from.
        skip_damaged: in training another image takes a damaged one's place, in evaluation it is skipped; else it is an
            error.
    """

    num_workers: int = 0
    cache: ImageCache | None = None
    pin_memory: bool = False
    skip_damaged: bool = False


def build_train_loader(
    index: ShardIndex,
    transform: Transform,
    order: EpochOrder,
    share: RankShare = RankShare(),
    loading: Loading = Loading(),
) -> BatchLoader:
    """One epoch of training batches of a rank: `share.accumulation` batches a step. `num_steps` of the result is the
    number of steps from `share.start` on, the same on every rank.

    Raises ValueError when the images and the batch size do not divide into ranks x micro-batches, or start lies beyond
    the epoch; see `EpochPlan`.
    """
    ids = order.of(index)
    plan = EpochPlan(
        ids,
        order.batch_size,
        share.accumulation,
        share.world_size,
        share.drop_last,
        share.start,
        order.num_copies,
        count_earlier(ids) if order.has_repeats else None,
    )
    damaged: Literal["fail", "replace"] = "replace" if loading.skip_damaged else "fail"
    images = ShardImages(index, transform, seed=order.seed, epoch=order.epoch, cache=loading.cache, damaged=damaged)
    return BatchLoader(
        images,
        _RankBatches(plan, share.rank),
        num_workers=loading.num_workers,
        num_steps=plan.num_steps,
        pin_memory=loading.pin_memory,
    )


def build_evaluation_loader(
    index: ShardIndex,
    transform: Transform,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    pin_memory: bool = False,
    skip_damaged: bool = False,
    done: Collection[int] = (),
    only_ids: np.ndarray | None = None,
) -> BatchLoader:
    """Build a loader of all images of a split in the order of their ids, each on exactly one rank, except the batches
    whose numbers are in `done`; of `only_ids` (int64, ascending) if given.

    Batches start at multiples of `batch_size`; a rank may have none. `num_steps` is the number of this rank's batches.
    With `skip_damaged` a damaged image is dropped from its batch, which may leave it empty.
    """
    num_images = index.num_samples if only_ids is None else len(only_ids)
    own = evaluation_batches(num_images, batch_size=batch_size, rank=rank, world_size=world_size, done=done)
    if only_ids is not None:
        own = [only_ids[positions] for positions in own]
    batches = [MicroBatch(ids, len(ids), len(ids)) for ids in own]
    dataset = ShardImages(index, transform, damaged="leave_out" if skip_damaged else "fail")
    return BatchLoader(dataset, batches, num_workers=num_workers, num_steps=len(batches), pin_memory=pin_memory)


class _RankBatches(Sequence[MicroBatch]):
    """The micro-batches of one rank, computed on demand."""

    def __init__(self, plan: EpochPlan, rank: int) -> None:
        if not 0 <= rank < plan.world_size:
            raise ValueError(f"rank must lie in [0, {plan.world_size}), got {rank}")
        self.plan = plan
        self.rank = rank

    def __len__(self) -> int:
        return self.plan.num_steps * self.plan.accumulation

    def __getitem__(self, position: int) -> MicroBatch:  # type: ignore[override]  # positions only, no slices
        if not 0 <= position < len(self):
            raise IndexError(position)
        step, micro_step = divmod(position, self.plan.accumulation)
        return self.plan.micro_batch(step, micro_step, self.rank)
