"""The order of an epoch and its division into steps, micro-batches and ranks, in pure numpy.

    random          order = argsort(rank_of_shard[shard] + W * u)    u uniform in [0, 1), W = window in shards
    class_balanced  batches of m classes x k images: consecutive permutations of the classes, each class cycling
                    through its own permutation of images
    by class size   n draws, a class of s images with a share proportional to s^p (p = 1/2: square-root sampling,
                    Mikolov et al., NIPS 2013; Mahajan et al., ECCV 2018; p = 0: all classes alike), again cycling

The random order uses at most W shards at a time; without a window it is a full permutation. Each order is a function
of (index, seed, epoch) alone. A step takes the next `batch_size` images of the order whatever the number of ranks;
accumulation and ranks only divide a step into slots, so any world size sees the same global batches, and the number of
consumed images is the position in an epoch for any batch size.

Repeated augmentation (Hoffer et al., CVPR 2020; Berman et al., arXiv 1902.05509) has r copies of an image side by side
in a step, each augmented differently. An epoch keeps its length, as in DeiT, so it visits one part in r of the images:
r epochs go through the r parts of one order. Together they visit every image r times, but for fewer than r images that
the parts have no room for.

Chosen: shares of classes that are rounded up or down at random (systematic sampling), so that no class that is due once
is missed by chance; independent draws would miss a third of those. Philox (counter-based, its stream is fixed by
numpy's policy) and sorting raw 64-bit draws, so that the order does not depend on the numpy version.
Declined: a stateful sampler, whose state must be sent to the workers and restored on resume; repeating images to fill
the last step, which counts them twice; class-balanced epochs that guarantee every image, impossible for classes with
fewer images than k, or one more than a multiple of it.
"""

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

# Distinguishes the uses of (seed, epoch).
_ORDER_STREAM = 1
_CLASS_STREAM = 2
_VALIDATION_STREAM = 3
_SHARES_STREAM = 4

_WEIGHT_UNIT = 1 << 16  # of a class's share; whole numbers add up to the same on every machine


class MicroBatch(NamedTuple):
    """Images of one rank in one micro-step."""

    ids: np.ndarray  # int64 [b]: positions in the split's index
    global_size: int  # images of this micro-step over all ranks
    step_size: int  # images of the whole optimizer step, over all its micro-steps and ranks
    visits: np.ndarray | None = None  # uint32 [b]: earlier visits of the image in this epoch; None: there are none


def epoch_order(shard_n: np.ndarray, *, seed: int, epoch: int, shuffle_window: int | None = None) -> np.ndarray:
    """Compute the order in which an epoch visits the samples: a permutation of 0..n-1, int64 [n].

    `shard_n` is the shard number of every sample. `shuffle_window` is the number of shards whose
    samples are mixed; None mixes all.
    """
    if shuffle_window is not None and shuffle_window < 1:
        raise ValueError(f"shuffle_window must be at least 1 shard, or null to shuffle over all, got {shuffle_window}")
    draws = np.random.Philox(np.random.SeedSequence([seed, epoch, _ORDER_STREAM]))
    if shuffle_window is None:
        return _argsort(draws.random_raw(len(shard_n)))
    num_shards = int(shard_n.max()) + 1 if len(shard_n) else 0
    rank_of_shard = _argsort(_argsort(draws.random_raw(num_shards)))
    uniform_n = (draws.random_raw(len(shard_n)) >> np.uint64(11)) * 2.0**-53
    return _argsort(rank_of_shard[shard_n] + shuffle_window * uniform_n)


def class_balanced_order(
    label_n: np.ndarray, *, classes_per_batch: int, images_per_class: int, seed: int, epoch: int
) -> np.ndarray:
    """Compute consecutive batches of exactly `classes_per_batch` classes x `images_per_class` images: int64 ids.

    `label_n` is the class of every sample. An epoch has as many full batches as fit into n images, at least one; the
    usage counts of any two classes differ by at most 1, as do those of two images of a class. The images of a class are
    adjacent. A class with fewer than `images_per_class` images repeats them.

    Raises:
        ValueError: a number is below 1, or fewer classes have images than a batch needs.
    """
    if classes_per_batch < 1 or images_per_class < 1:
        raise ValueError(
            f"class-balanced batches need at least 1 class and 1 image, got {classes_per_batch} x {images_per_class}"
        )
    classes, label_n = np.unique(label_n, return_inverse=True)
    if classes_per_batch > len(classes):
        raise ValueError(
            f"batches of {classes_per_batch} classes x {images_per_class} images: expected at least "
            f"{classes_per_batch} classes with images, got {len(classes)}; use a smaller batch_size, or more images "
            "per class"
        )
    draws = np.random.Philox(np.random.SeedSequence([seed, epoch, _CLASS_STREAM]))
    num_batches = max(1, len(label_n) // (classes_per_batch * images_per_class))
    class_s = _class_sequence(len(classes), classes_per_batch, num_batches, draws)
    return _images_in_turn(class_s, label_n, images_per_use=images_per_class, draws=draws)


def class_share_order(label_n: np.ndarray, *, power: float, seed: int, epoch: int) -> np.ndarray:
    """Compute an order of n draws in which a class of s images has a share proportional to s^power: int64 ids [n].

    Its number of draws is its share of n, rounded up or down at random without bias. Its images come in a random order
    of their own, again and again, so two of them are used equally often or once apart.

    Args:
        label_n: the class of every sample.
        power: 0 to 1.
    """
    assert 0 <= power <= 1
    classes, label_n = np.unique(label_n, return_inverse=True)
    draws = np.random.Philox(np.random.SeedSequence([seed, epoch, _SHARES_STREAM]))
    offset = int(draws.random_raw()) >> 48  # in units of 2^-16
    weight_c = np.rint(np.bincount(label_n).astype(np.float64) ** power * _WEIGHT_UNIT).astype(np.int64)
    weight_c //= max(1, np.gcd.reduce(weight_c))  # so that with power 1, up to 9e7 images, the products below are exact
    # Draws that are due to this class and those before. Products above 2^53 are rounded, so that of all may miss n.
    due_c = np.cumsum(weight_c) * float(len(label_n)) / max(1, int(weight_c.sum()))
    done_c = np.floor(due_c + offset * 2.0**-16).astype(np.int64)
    done_c[-1:] = len(label_n)
    num_draws_c = done_c - np.concatenate([[0], done_c[:-1]])
    class_n = np.repeat(np.arange(len(classes)), num_draws_c)[_argsort(draws.random_raw(len(label_n)))]
    return _images_in_turn(class_n, label_n, images_per_use=1, draws=draws)


def repeated_order(order: np.ndarray, *, num_copies: int, part: int) -> np.ndarray:
    """Return one part in `num_copies` of an order, each image `num_copies` times in a row.

    Raises:
        ValueError: there are fewer images than parts.
    """
    length = len(order) // num_copies
    if length == 0:
        raise ValueError(
            f"expected data.repeated_augmentation of at most the {len(order)} images of an epoch, got {num_copies}; "
            "lower it"
        )
    return np.repeat(order[part * length : (part + 1) * length], num_copies)


def count_earlier(order: np.ndarray) -> np.ndarray:
    """Count for each place of an order how often its image came before: uint32 [n]."""
    by_image = np.argsort(order, kind="stable")
    is_first = np.diff(order[by_image], prepend=-1) != 0
    place_n = np.arange(len(order))
    earlier_n = np.empty(len(order), dtype=np.uint32)
    earlier_n[by_image] = place_n - np.maximum.accumulate(np.where(is_first, place_n, 0))
    return earlier_n


def draw_classes(num_classes: int, *, seed: int) -> np.ndarray:
    """Order all classes at random: int64 [num_classes], a pure function of its arguments. The first are held out of
    training as validation classes, the last train.
    """
    draws = np.random.Philox(np.random.SeedSequence([seed, 0, _VALIDATION_STREAM]))
    return _argsort(draws.random_raw(num_classes))


def _class_sequence(num_classes: int, classes_per_batch: int, num_batches: int, draws: np.random.Philox) -> np.ndarray:
    """Compute the classes of all batches, int64 [num_batches * classes_per_batch], no class twice in a batch.

    Consecutive permutations of all classes. Where a batch spans two of them, the classes it has from the first move to
    the end of the second.
    """
    num_rounds = -(-num_batches * classes_per_batch // num_classes)
    draws_rC = draws.random_raw(num_rounds * num_classes).reshape(num_rounds, num_classes)
    rounds_rC = np.argsort(draws_rC, axis=1, kind="stable")
    begun = np.zeros(num_classes, dtype=bool)
    for number in range(1, num_rounds):
        num_begun = number * num_classes % classes_per_batch
        if num_begun:
            begun[rounds_rC[number - 1, -num_begun:]] = True
            waits_C = begun[rounds_rC[number]]
            rounds_rC[number] = np.concatenate([rounds_rC[number][~waits_C], rounds_rC[number][waits_C]])
            begun[:] = False
    return rounds_rC.ravel()[: num_batches * classes_per_batch]


def _images_in_turn(
    class_s: np.ndarray, label_n: np.ndarray, *, images_per_use: int, draws: np.random.Philox
) -> np.ndarray:
    """Replace each use of a class by the next images of its cycle: labels 0 to C - 1, int64 [s * images_per_use]."""
    # Each class's images in their own random order, class after class.
    shuffled_n = _argsort(draws.random_raw(len(label_n)))
    by_class_n = shuffled_n[np.argsort(label_n[shuffled_n], kind="stable")]
    num_images_c = np.bincount(label_n)
    first_c = np.cumsum(num_images_c) - num_images_c

    # The j-th use of a class takes the next images of its cycle.
    by_use_s = np.argsort(class_s, kind="stable")
    num_uses_c = np.bincount(class_s, minlength=len(num_images_c))
    use_s = np.empty_like(class_s)
    use_s[by_use_s] = np.arange(len(class_s)) - np.repeat(np.cumsum(num_uses_c) - num_uses_c, num_uses_c)
    turn_sk = use_s[:, None] * images_per_use + np.arange(images_per_use)
    order: np.ndarray = by_class_n[first_c[class_s][:, None] + turn_sk % num_images_c[class_s][:, None]].ravel()
    return order


def _argsort(values: np.ndarray) -> np.ndarray:
    """Sort stably; the unstable sort, used if no two values are equal, is several times as fast."""
    order = np.argsort(values)
    ascending = values[order]
    if (ascending[1:] == ascending[:-1]).any():
        order = np.argsort(values, kind="stable")
    return order.astype(np.int64, copy=False)


def count_steps(num_images: int, *, batch_size: int, drop_last: bool = False) -> int:
    """Count the optimizer steps over `num_images`: full ones, and a short one unless dropped."""
    return num_images // batch_size if drop_last else -(-num_images // batch_size)


@dataclass(frozen=True, eq=False)
class EpochPlan:
    """An epoch's order, from `start` on, divided into optimizer steps of `batch_size` images, and those into slots.

    A step has `accumulation` x `world_size` slots, which differ in size by at most one image. The remainder forms a
    last short step or, with `drop_last`, is dropped. A remainder below half a batch is balanced with the last full
    step: no step is larger than the others, and none so small that its gradient is all noise or a rank has no image.
    The division depends on the number of images, `batch_size` and `num_copies` alone; a step has all copies of its
    images.

    Raises:
        ValueError: `start` lies beyond the order, or a step has fewer images than slots.
    """

    order: np.ndarray  # int64 [n]
    batch_size: int
    accumulation: int
    world_size: int
    drop_last: bool = False
    start: int = 0  # images of the order already consumed
    num_copies: int = 1  # of each image, side by side in the order
    earlier: np.ndarray | None = None  # uint32 [n], as `count_earlier`; None: no image comes twice

    def __post_init__(self) -> None:
        slots = self.accumulation * self.world_size
        assert self.batch_size % slots == 0, "Config.micro_batch_size refuses such a batch"
        assert self.batch_size % self.num_copies == 0, "the configuration refuses such a batch"
        if not 0 <= self.start <= len(self.order):
            raise ValueError(f"start must lie in [0, {len(self.order)}], got {self.start}")
        smallest = min(np.diff(self._bounds), default=0)
        if self.start < len(self.order) and smallest < slots and not (self.drop_last and self.start > 0):
            raise ValueError(
                f"{len(self.order) - self.start} images in steps of {self.batch_size} (drop_last={self.drop_last}) "
                f"leave {smallest} for one step, which has {slots} slots ({self.world_size} ranks x "
                f"{self.accumulation} micro-batches); use fewer ranks or micro-batches, or another batch_size"
                + ("" if self.drop_last else ", or set drop_last")
            )

    @cached_property
    def _bounds(self) -> np.ndarray:
        """Return the start of each step in the order, and the end of the last: int64 [num_steps + 1]."""
        num_left = len(self.order) - self.start
        whole, tail = divmod(num_left, self.batch_size)
        num_steps = count_steps(num_left, batch_size=self.batch_size, drop_last=self.drop_last)
        bounds = self.start + np.minimum(np.arange(num_steps + 1) * self.batch_size, num_left)
        if not self.drop_last and whole and 0 < 2 * tail < self.batch_size:
            half = (self.batch_size + tail) // 2
            bounds[-2] = len(self.order) - half // self.num_copies * self.num_copies
        return bounds

    @property
    def num_steps(self) -> int:
        """Number of optimizer steps from `start` to the end of the epoch, the same on every rank."""
        return len(self._bounds) - 1

    def step(self, step: int) -> np.ndarray:
        """Return the images of the `step`-th optimizer step over all ranks, in order: int64 [at most batch_size]."""
        if not 0 <= step < self.num_steps:
            raise ValueError(f"step must lie in [0, {self.num_steps}), got {step}")
        return self.order[self._bounds[step] : self._bounds[step + 1]]

    def micro_batch(self, step: int, micro_step: int, rank: int) -> MicroBatch:
        """Return the part of a step that `rank` computes in micro-step `micro_step`."""
        ids, first = self.step(step), self._bounds[step]
        slots = self.accumulation * self.world_size
        cuts = [i * len(ids) // slots for i in range(slots + 1)]
        slot = micro_step * self.world_size + rank
        global_size = cuts[(micro_step + 1) * self.world_size] - cuts[micro_step * self.world_size]
        own = slice(cuts[slot], cuts[slot + 1])
        visits = None if self.earlier is None else self.earlier[first : first + len(ids)][own]
        return MicroBatch(ids[own], global_size, len(ids), visits)


def evaluation_batches(
    num_samples: int, *, batch_size: int, rank: int = 0, world_size: int = 1, done: Collection[int] = ()
) -> list[np.ndarray]:
    """Return the batches of `rank` in an evaluation: batch j holds the ids j*batch_size ..
    (j+1)*batch_size - 1, the last one may be short.

    Each rank takes a contiguous range of the batches that are not `done`, so that every image is embedded once and in
    the same batch for any number of ranks; a rank may have none.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size of an evaluation must be at least 1, got {batch_size}")
    left = [j for j in range(-(-num_samples // batch_size)) if j not in done]
    first, last = rank * len(left) // world_size, (rank + 1) * len(left) // world_size
    return [np.arange(j * batch_size, min((j + 1) * batch_size, num_samples), dtype=np.int64) for j in left[first:last]]
