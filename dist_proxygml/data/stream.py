"""Training batches straight from WebDataset shards without an index, through webdataset's own pipeline.

For shards that cannot be read twice, or that nobody can index. What users of webdataset know holds here too, and none
of what the indexed loader promises:

    resampled   every loading process draws shards with replacement: an "epoch" misses about a third of the images and
                repeats others
    otherwise   every loading process keeps a fixed part of the shards and goes round it: parts of different sizes are
                seen unequally often, and a process without a shard is refused
    both        shuffled within a buffer; the order depends on ranks and loading processes; resuming starts the streams
                anew; damage in a tar's headers drops samples silently; labels are checked against num_classes alone

Every rank does the same number of steps, with full batches. Evaluation never reads a stream.
"""

import itertools
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import webdataset
from torch.utils.data import IterableDataset, get_worker_info

from dist_proxygml.data.damage import Damage
from dist_proxygml.data.images import decode_image
from dist_proxygml.data.pipeline import Batch
from dist_proxygml.data.shards import IMAGE_EXTENSIONS
from dist_proxygml.data.transforms import Transform
from dist_proxygml.data.workers import WorkerLoader, ready_to_leave


class StreamLoader:
    """An iterable of `num_steps` steps of micro-batches of one rank. Iterating again gives other images."""

    def __init__(self, images: "_StreamImages", *, num_steps: int, accumulation: int, num_workers: int) -> None:
        self.num_steps = num_steps
        self._num_batches = num_steps * accumulation
        self._loader = WorkerLoader(images, num_workers=num_workers, batch_size=None)

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[Batch]:
        for batch in itertools.islice(self._loader, self._num_batches):
            if isinstance(batch, str):  # a worker's ValueError; a DataLoader would wrap it in a traceback
                raise ValueError(batch)
            yield batch


def build_stream_loader(
    urls: str,
    transform: Transform,
    *,
    num_classes: int,
    batch_size: int,
    num_images: int,
    accumulation: int = 1,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    epoch: int = 0,
    start: int = 0,
    num_workers: int = 0,
    resampled: bool = True,
    shuffle_buffer: int = 1000,
    skip_damaged: bool = False,
) -> StreamLoader:
    """Full steps over about `num_images` images of all ranks, from shards that webdataset's brace notation names.

    `batch_size` counts the images of one optimizer step over all ranks and micro-batches. `start` only picks another
    random stream than the epoch's beginning had.

    Raises:
        ValueError: batch_size does not divide into ranks x micro-batches, or, unless `resampled`, there are fewer
            shards than loading processes over all ranks.
    """
    slots = world_size * accumulation
    if batch_size % slots:
        raise ValueError(
            f"batch_size {batch_size} does not divide into {world_size} ranks x {accumulation} micro-batches; use "
            f"{max(slots, batch_size // slots * slots)}"
        )
    shards = webdataset.shardlists.expand_urls(urls)
    num_readers = world_size * max(1, num_workers)
    if not resampled and len(shards) < num_readers:
        raise ValueError(
            f"a stream of {len(shards)} shards for {num_readers} loading processes ({world_size} ranks x "
            f"{max(1, num_workers)}) leaves some without any; use fewer, or data.stream.resampled"
        )
    images = _StreamImages(
        shards,
        transform,
        num_classes=num_classes,
        batch_size=batch_size // slots,
        global_size=batch_size // accumulation,
        step_size=batch_size,
        rank=rank,
        world_size=world_size,
        seeds=(seed, epoch, start),
        resampled=resampled,
        shuffle_buffer=shuffle_buffer,
        skip_damaged=skip_damaged,
    )
    return StreamLoader(images, num_steps=num_images // batch_size, accumulation=accumulation, num_workers=num_workers)


class _StreamImages(IterableDataset[Batch | str]):
    """Micro-batches without end, a stream for each loading process."""

    def __init__(
        self,
        shards: list[str],
        transform: Transform,
        *,
        num_classes: int,
        batch_size: int,
        global_size: int,
        step_size: int,
        rank: int,
        world_size: int,
        seeds: tuple[int, ...],
        resampled: bool,
        shuffle_buffer: int,
        skip_damaged: bool,
    ) -> None:
        self.shards = shards
        self.transform = transform
        self.num_classes = num_classes
        self.batch_size = batch_size
        self.global_size = global_size
        self.step_size = step_size
        self.rank = rank
        self.world_size = world_size
        self.seeds = seeds
        self.resampled = resampled
        self.shuffle_buffer = shuffle_buffer
        self.skip_damaged = skip_damaged

    def __iter__(self) -> Iterator[Batch | str]:
        try:
            yield from self._batches()
        except Exception as problem:  # tarfile, curl's exit status, decoders: each its own type
            yield f"the stream {self.shards[0]} ... failed: {type(problem).__name__}: {problem}"

    def _batches(self) -> Iterator[Batch]:
        worker = get_worker_info()
        number, num_workers = (worker.id, worker.num_workers) if worker else (0, 1)
        reader, num_readers = self.rank * num_workers + number, self.world_size * num_workers
        randomness = np.random.SeedSequence([*self.seeds, reader])
        generators = (np.random.Generator(np.random.Philox(child)) for child in _children(randomness))
        images: list[torch.Tensor] = []
        labels: list[int] = []
        damaged: list[Damage] = []
        for sample in self._samples(reader, num_readers, random.Random(int(randomness.generate_state(1)[0]))):
            try:
                image, label = self._read(sample)
            except ValueError as problem:
                if not self.skip_damaged:
                    raise
                damaged.append(Damage(_name(sample), str(problem)))
                continue
            images.append(image)
            labels.append(label)
            if len(images) == self.batch_size:
                transformed = self.transform(images, list(itertools.islice(generators, len(images))))
                ids = torch.full((len(images),), -1)
                yield Batch(
                    ready_to_leave(transformed),
                    torch.tensor(labels),
                    ids,
                    self.global_size,
                    self.step_size,
                    tuple(damaged),
                )
                images, labels, damaged = [], [], []

    def _samples(self, reader: int, num_readers: int, generator: random.Random) -> Iterator[dict[str, Any]]:
        handler = webdataset.warn_and_continue if self.skip_damaged else webdataset.reraise_exception
        samples = webdataset.DataPipeline(
            lambda: ({"url": url} for url in self._urls(reader, num_readers, generator)),
            webdataset.tarfile_to_samples(handler=handler),
            webdataset.shuffle(self.shuffle_buffer, initial=self.shuffle_buffer, rng=generator),
        )
        return iter(samples)

    def _urls(self, reader: int, num_readers: int, generator: random.Random) -> Iterator[str]:
        if self.resampled:
            while True:
                yield generator.choice(self.shards)
        own = self.shards[reader::num_readers]
        while True:
            yield from generator.sample(own, len(own))

    def _read(self, sample: dict[str, Any]) -> tuple[torch.Tensor, int]:
        payload = next((sample[extension] for extension in IMAGE_EXTENSIONS if extension in sample), None)
        if payload is None or "cls" not in sample:
            fields = sorted(name for name in sample if not name.startswith("__"))
            raise ValueError(f"{_name(sample)} has members {fields}; expected an image (jpg, jpeg or png) and cls")
        text = sample["cls"].decode("ascii", "replace").strip()
        if not text.isdigit() or int(text) >= self.num_classes:
            raise ValueError(f"{_name(sample)} has the label {text[:40]!r}; expected 0 to {self.num_classes - 1}")
        try:
            return decode_image(payload), int(text)
        except ValueError as problem:
            raise ValueError(f"{_name(sample)}: {problem}") from problem


def _name(sample: dict[str, Any]) -> str:
    return f"{sample.get('__url__')}, sample {sample.get('__key__')}"


def _children(sequence: np.random.SeedSequence) -> Iterator[np.random.SeedSequence]:
    while True:
        yield from sequence.spawn(1)
