"""Training data of a run: a split of indexed shards, or a stream.

Some classes of the split may be held out (data.validation_classes); which ones depends only on the seed and their
number. The remaining ones form a split of their own with labels 0, 1, ..., so training never sees the others.

The position in the data is an epoch and the number of consumed images in that epoch's order. It advances with each
optimizer step, so prefetched batches do not count, and it means the same for any number of ranks and loading processes
and, where every image comes once per epoch, for any batch size.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int

from dist_proxygml.checkpoint.folder import read_state
from dist_proxygml.checkpoint.model import TrainedModel
from dist_proxygml.config import Config
from dist_proxygml.data.audit import count_trained_images
from dist_proxygml.data.damage import num_allowed
from dist_proxygml.data.index import ShardIndex, open_index
from dist_proxygml.data.order import count_steps, draw_classes
from dist_proxygml.data.pipeline import BatchLoader, EpochOrder, ImageCache, Loading, RankShare, build_train_loader
from dist_proxygml.data.stream import StreamLoader, build_stream_loader
from dist_proxygml.data.transforms import build_transform
from dist_proxygml.distributed.parallel import ParallelContext


@dataclass(frozen=True)
class TrainingData:
    """The training images of a run."""

    config: Config
    index: ShardIndex | None  # the trained classes; None for a stream
    validation: ShardIndex | None = None  # the held-out classes, if any

    @property
    def epoch_size(self) -> int:
        """Number of images per epoch: all of the index, as many that all have their copies, full class-balanced
        batches, or as configured for a stream, whatever the batch size: a position must lie in it for any.
        """
        if self.index is None:
            assert self.config.data.stream is not None
            return self.config.data.stream.samples_per_epoch
        if self.config.data.images_per_class is not None:
            batch_size = self.config.training.batch_size
            return max(1, self.index.num_samples // batch_size) * batch_size
        num_copies = self.config.data.repeated_augmentation or 1
        return self.index.num_samples // num_copies * num_copies

    def order(self, epoch: int) -> EpochOrder:
        """The order of an epoch."""
        data = self.config.data
        return EpochOrder(
            self.config.training.batch_size,
            self.config.seed,
            epoch,
            data.shuffle_window,
            data.images_per_class,
            data.sampling_power,
            data.repeated_augmentation or 1,
        )

    def count_steps(self, consumed: int = 0) -> int:
        """Count the optimizer steps from the `consumed`-th image to the end of an epoch; of a stream full ones only."""
        return count_steps(
            self.epoch_size - consumed,
            batch_size=self.config.training.batch_size,
            drop_last=self.config.data.drop_last or self.index is None,
        )

    def loader(
        self, context: ParallelContext, *, epoch: int, start: int, cache: ImageCache | None = None
    ) -> BatchLoader | StreamLoader:
        """Build the loader of this rank's batches of an epoch, after its first `start` images.

        Raises:
            ValueError: the images or the batch size do not divide into ranks and micro-batches.
        """
        data = self.config.data
        transform = build_transform(data.train_transform)
        order = self.order(epoch)
        share = RankShare(context.rank, context.world_size, self.config.accumulation, start, data.drop_last)
        on_gpu, skip_damaged = context.device.type == "cuda", data.damaged_images == "skip"
        if self.index is None:
            assert data.stream is not None
            return build_stream_loader(
                data.stream.urls,
                transform,
                order,
                share,
                num_classes=self.config.num_classes,
                num_images=self.epoch_size - start,
                num_workers=data.num_workers,
                resampled=data.stream.resampled,
                shuffle_buffer=data.stream.shuffle_buffer,
                max_damaged=num_allowed(data.max_damaged, self.epoch_size) if skip_damaged else None,
                pin_memory=on_gpu,
            )
        loading = Loading(data.num_workers, cache, pin_memory=on_gpu, skip_damaged=skip_damaged)
        return build_train_loader(self.index, transform, order, share, loading)

    def check(self, context: ParallelContext) -> None:
        """Check, as far as possible in advance, that this rank's first batches can be read.

        Raises:
            ValueError: as `loader`, or no sample of a stream can be used.
        """
        loader = self.loader(context, epoch=0, start=0)
        if isinstance(loader, StreamLoader):
            loader.check()

    def seen_classes(self, index: ShardIndex) -> Bool[np.ndarray, " C"] | None:
        """Find which classes of a split of these shards are trained; None if names do not tell."""
        trained_C = self.trained_images(index)
        return None if trained_C is None else trained_C >= 0

    def trained_images(self, index: ShardIndex) -> Int[np.ndarray, " C"] | None:
        """Count the trained images of each class of a split of these shards; -1: the class is not trained. None if
        names do not tell.
        """
        if index is self.validation:
            return np.full(index.num_classes, -1)
        if self.index is None:
            return None
        return count_trained_images(self.index.classes, index, is_same_split=index.split == self.index.split)

    def identity(self) -> dict[str, str]:
        """Return the hashes that must match when the run is resumed."""
        if self.index is None:
            return {}
        return {"class table": self.index.class_table_sha256, "shards": self.index.sha256}

    def __str__(self) -> str:
        if self.index is None:
            num_images = self.count_steps() * self.config.training.batch_size
            return f"a stream of {self.config.num_classes:,} classes, {num_images:,} images an epoch"
        text = f"{self.index.num_samples:,} images of {self.index.num_classes:,} classes"
        if self.validation is not None:
            text += f" (without {self.validation.num_classes:,} validation classes)"
        batch_size, images_per_class = self.config.training.batch_size, self.config.data.images_per_class
        power, num_copies = self.config.data.sampling_power, self.config.data.repeated_augmentation
        if images_per_class is not None:
            text += f", in batches of {batch_size // images_per_class:,} classes x {images_per_class} images"
        if power is not None:
            text += f", classes drawn in proportion to their number of images to the power of {power:g}"
        if num_copies is not None:
            text += f", in batches of {batch_size // num_copies:,} images x {num_copies} copies"
        if images_per_class is None and power is None and num_copies is None:
            return text
        share = len(np.unique(self.order(0).of(self.index))) / self.index.num_samples
        return f"{text} (the first epoch visits {share:.1%} of them)"


def open_training_data(config: Config) -> TrainingData:
    """Open the configured training split without its held-out classes, or the stream.

    Raises:
        ValueError: as `open_index`; or the number of classes differs from the configuration's, one side has no image,
            or the cache of remote shards is smaller than what an epoch's order uses at a time.
    """
    if config.data.stream is not None:
        return TrainingData(config, None)
    index = open_split(config, config.data.train_split)
    if index.num_classes != config.num_classes:
        raise ValueError(
            f"data.num_classes is {config.data.num_classes}, but the split {config.data.train_split!r} of "
            f"{config.data.shards} has {index.num_classes} classes"
            f"{'' if config.data.validation_classes is None else ', validation classes among them'}; edit the "
            "configuration or point data.shards at the right shards"
        )
    _check_cache_holds_window(config, index)
    if config.data.validation_classes is None and config.data.train_classes is None:
        return TrainingData(config, index)
    trained, validation = _choose_classes(config, index)
    return TrainingData(config, trained, validation)


def open_validation(config: Config, checkpoint: Path) -> ShardIndex:
    """Open the validation classes that a checkpoint was trained without.

    Raises:
        ValueError: there are none, or these shards and settings give others; or as `open_training_data`.
    """
    trained_with = read_state(checkpoint).settings
    if trained_with.get("data.validation_classes") is None:
        raise ValueError(
            f"expected validation classes in run {config.name!r}, found none; train one with data.validation_classes, "
            "or evaluate another split"
        )
    data = open_training_data(config)
    found = {**data.identity(), "seed": config.seed, "data.validation_classes": config.data.validation_classes}
    differing = [name for name, value in found.items() if trained_with.get(name) != value]
    if differing or data.validation is None:
        what = ", ".join(differing)
        raise ValueError(
            f"expected the validation classes that {checkpoint} was trained without, got others ({what} differ); point "
            "data.shards at the shards it was trained with, and leave its settings as they were"
        )
    return data.validation


def trained_images(checkpoint: Path, index: ShardIndex) -> tuple[Int[np.ndarray, " C"] | None, str | None]:
    """Count the images of each class of a split that a checkpoint was trained on, by its own class table; -1: the class
    was not trained. None if that is unknown, and why where a table should have been there.
    """
    state = read_state(checkpoint)
    trained = TrainedModel(checkpoint, state.step, state.settings)
    if not trained.has_class_names:
        return None, None
    is_same = (index.sha256, index.split) == (state.settings["shards"], state.settings["data.train_split"])
    try:
        return count_trained_images(trained.classes(), index, is_same_split=is_same), None
    except ValueError as error:
        return None, str(error)


def _choose_classes(config: Config, index: ShardIndex) -> tuple[ShardIndex, ShardIndex | None]:
    """Split off the validation classes: what trains of the training split, and they."""
    order = draw_classes(index.num_classes, seed=config.seed)
    held_out, trained = order[: config.num_validation_classes], order[len(order) - config.num_trained_classes :]
    parts = [index.choose_classes(trained, name=index.split)]
    if len(held_out):
        parts.append(index.choose_classes(held_out, name=f"validation classes of {index.split}"))
    empty = next((part for part in parts if part.num_samples == 0), None)
    if empty is not None:
        raise ValueError(
            f"expected images of the {len(trained)} trained and of the {len(held_out)} validation classes, found none "
            f"of the {empty.num_classes} of one side; change data.validation_classes, data.train_classes or seed"
        )
    return parts[0], parts[1] if len(held_out) else None


def count_classes(config: Config) -> Config:
    """Fill in data.num_classes from the index of the shards if the configuration does not set it.

    Raises:
        ValueError: as `open_index`.
    """
    if config.data.num_classes is not None:
        return config
    num_classes = open_split(config, config.data.train_split).num_classes
    return config.model_copy(update={"data": config.data.model_copy(update={"num_classes": num_classes})})


def open_split(config: Config, split: str, *, shards: str | None = None) -> ShardIndex:
    """Open a split of the configured shards, or of others given by the user; both use the configured cache.

    Raises:
        ValueError: as `open_index`.
    """
    directory, limit = config.data.cache_directory, config.data.cache_limit_bytes
    return open_index(
        shards or config.data.shards,
        split,
        cache_directory=None if directory is None else Path(directory),
        cache_limit=limit,
        is_typed=shards is not None or config.data.is_typed,
    )


def _check_cache_holds_window(config: Config, index: ShardIndex) -> None:
    """Refuse a cache that the shuffle would thrash."""
    limit, window = config.data.cache_limit_bytes, config.data.shuffle_window
    if index.remote is None or limit is None:
        return
    sizes = sorted((shard.bytes for shard in index.shards), reverse=True)
    has_window = config.data.images_per_class is None and config.data.sampling_power is None
    in_use = sum(sizes[:window] if has_window else sizes)
    if in_use > limit:
        fitting = sum(1 for total in itertools.accumulate(sizes) if total <= limit)
        raise ValueError(
            f"the order of an epoch keeps {in_use / 2**30:.2f} GiB of shards in use at a time, and data.cache_limit is "
            f"{config.data.cache_limit}; raise it"
            + (f", or set data.shuffle_window to at most {max(1, fitting)}" if has_window else "")
        )
