"""The order of an epoch and its cut into steps, micro-batches and ranks, in pure numpy.

    order = argsort(rank_of_shard[shard] + W * u)     u uniform in [0, 1), W = window in shards

so at most W shards are in use at a time; without a window the order is a permutation of
everything. The order is a function of (index, seed, epoch) alone, and every image comes exactly
once an epoch. A step takes the next `batch_size` images of the order whatever the number of ranks;
accumulation and ranks only cut a step into slots, so any world size sees the same global batches.

Chosen: Philox (counter-based, its stream is fixed by numpy's policy) and sorting raw 64-bit draws,
so that the order outlives numpy versions.
Declined: a sampler with state, which must be carried to the workers and restored on resume.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

_ORDER_STREAM = 1  # tells this use of (seed, epoch) from other ones


class MicroBatch(NamedTuple):
    """The images of one rank in one micro-step."""

    ids: np.ndarray  # int64 [b]: positions in the split's index
    global_size: int  # images of this micro-step over all ranks
    step_size: int  # images of the whole optimizer step, over all its micro-steps and ranks


def epoch_order(shard_n: np.ndarray, *, seed: int, epoch: int, shuffle_window: int | None = None) -> np.ndarray:
    """The order in which an epoch visits the samples: a permutation of 0..n-1, int64 [n].

    `shard_n` gives the shard number of every sample. `shuffle_window` is the number of shards whose
    samples mix; None mixes all.
    """
    if shuffle_window is not None and shuffle_window < 1:
        raise ValueError(f"shuffle_window must be at least 1 shard, or null to shuffle over all, got {shuffle_window}")
    draws = np.random.Philox(np.random.SeedSequence([seed, epoch, _ORDER_STREAM]))
    if shuffle_window is None:
        return _argsort(draws.random_raw(len(shard_n)))
    num_shards = int(shard_n.max(initial=-1)) + 1
    rank_of_shard = _argsort(_argsort(draws.random_raw(num_shards)))
    uniform_n = (draws.random_raw(len(shard_n)) >> np.uint64(11)) * 2.0**-53
    return _argsort(rank_of_shard[shard_n] + shuffle_window * uniform_n)


def _argsort(values: np.ndarray) -> np.ndarray:
    return np.argsort(values, kind="stable").astype(np.int64, copy=False)


@dataclass(frozen=True, eq=False)
class EpochPlan:
    """An epoch's order cut into optimizer steps of `batch_size` images, and those into slots.

    A step has `accumulation` x `world_size` slots. Slots of a step differ in size by at most one
    image. The last step of an epoch may be short. A short step with fewer images than slots would
    leave a rank or a micro-batch without any image: only then is it dropped; `num_dropped` images
    are then not seen this epoch (others the next one, as the order changes). With `drop_last` a
    short step is always dropped.
    """

    order: np.ndarray  # int64 [n]
    batch_size: int
    accumulation: int
    world_size: int
    drop_last: bool = False

    def __post_init__(self) -> None:
        slots = self.accumulation * self.world_size
        if self.batch_size < 1 or self.batch_size % slots:
            lower = self.batch_size // slots * slots
            allowed = f"{lower} or {lower + slots}" if lower else f"{slots}"
            worlds = [w for w in range(1, self.batch_size + 1) if self.batch_size % (w * self.accumulation) == 0]
            raise ValueError(
                f"batch_size {self.batch_size} does not divide into {self.world_size} ranks x "
                f"{self.accumulation} micro-batches; "
                f"use batch_size {allowed}, or one of {worlds[:12]} ranks"
            )
        if self.num_steps == 0:
            raise ValueError(
                f"{len(self.order)} images make no step of {self.batch_size} images over {slots} "
                f"slots (drop_last={self.drop_last}); "
                f"use a smaller batch_size or fewer ranks"
            )

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the epoch, the same on every rank."""
        whole, tail = divmod(len(self.order), self.batch_size)
        keeps_tail = not self.drop_last and tail >= self.accumulation * self.world_size
        return whole + keeps_tail

    @property
    def num_dropped(self) -> int:
        """Images of the order that no step visits."""
        return max(0, len(self.order) - self.num_steps * self.batch_size)

    def step(self, step: int) -> np.ndarray:
        """The images of an optimizer step over all ranks, in order: int64 [at most batch_size]."""
        if not 0 <= step < self.num_steps:
            raise ValueError(f"step must lie in [0, {self.num_steps}), got {step}")
        return self.order[step * self.batch_size : (step + 1) * self.batch_size]

    def micro_batch(self, step: int, micro_step: int, rank: int) -> MicroBatch:
        """The part of a step that `rank` computes in micro-step `micro_step`."""
        ids = self.step(step)
        cuts = [
            i * len(ids) // (self.accumulation * self.world_size)
            for i in range(self.accumulation * self.world_size + 1)
        ]
        slot = micro_step * self.world_size + rank
        global_size = cuts[(micro_step + 1) * self.world_size] - cuts[micro_step * self.world_size]
        return MicroBatch(ids[cuts[slot] : cuts[slot + 1]], global_size, len(ids))

    def micro_batches(self, rank: int, *, start_step: int = 0) -> Iterator[MicroBatch]:
        """The micro-batches of a rank from `start_step` to the end, `accumulation` a step."""
        for step in range(start_step, self.num_steps):
            for micro_step in range(self.accumulation):
                yield self.micro_batch(step, micro_step, rank)


def evaluation_batches(num_samples: int, *, batch_size: int, rank: int, world_size: int) -> list[np.ndarray]:
    """The batches of `rank` in an evaluation: batch j holds the ids j*batch_size ..
    (j+1)*batch_size - 1, the last one may be short.

    Each rank takes a contiguous range of batches, so that every image is embedded once and in the
    same company for any number of ranks; a rank may have none.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size of an evaluation must be at least 1, got {batch_size}")
    num_batches = -(-num_samples // batch_size)
    first, last = rank * num_batches // world_size, (rank + 1) * num_batches // world_size
    return [
        np.arange(j * batch_size, min((j + 1) * batch_size, num_samples), dtype=np.int64) for j in range(first, last)
    ]
