"""Training batches from WebDataset shards without an index, through webdataset's own pipeline.

For shards that cannot be read twice or indexed. The usual behaviour of webdataset applies, without any guarantee of the
indexed loader:

    resampled   every loading process draws shards with replacement: an "epoch" misses about a third of the images and
                repeats others
    otherwise   every loading process cycles through a fixed part of the shards: parts of different sizes are seen with
                different frequency, and a process without a shard is refused
    both        shuffled within a buffer; the order depends on ranks and loading processes; resuming restarts the
                streams; damage in a tar's headers may drop samples silently; labels are only checked against
                num_classes

Every rank takes the same number of steps, with full batches. Evaluation never reads a stream. A missing shard ends a
stream, as does a pass over a process's shards without a usable sample: until the first one of a pass is found, samples
are also decoded before they enter the buffer.
"""

import contextlib
import itertools
import os
import random
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any
from urllib.parse import urlparse

import numpy as np
import torch
import webdataset
from torch.utils.data import IterableDataset, get_worker_info
from webdataset.gopen import Pipe, gopen
from webdataset.tariterators import group_by_keys, tar_file_iterator

from dist_proxygml.data.damage import Damage
from dist_proxygml.data.images import decode_image
from dist_proxygml.data.pipeline import Batch, EpochOrder, RankShare
from dist_proxygml.data.shards import (
    IMAGE_EXTENSIONS,
    ShardUnavailableError,
    read_label,
    shown_key,
    split_name,
    wrong_members,
)
from dist_proxygml.data.transforms import Transform
from dist_proxygml.data.workers import WorkerLoader, ready_to_leave
from dist_proxygml.storage.files import parse_json

_NUM_TRIED = 100  # unusable samples before a stream without any usable one is given up


class StreamLoader:
    """An iterable of `num_steps` steps of micro-batches of one rank; each iteration gives other images."""

    def __init__(
        self, images: "_StreamImages", *, num_steps: int, accumulation: int, num_workers: int, pin_memory: bool = False
    ) -> None:
        self.num_steps = num_steps
        self._images = images
        self._num_processes = max(1, num_workers)
        self._num_batches = num_steps * accumulation
        self._loader = WorkerLoader(images, num_workers=num_workers, batch_size=None, pin_memory=pin_memory)

    def __len__(self) -> int:
        return self._num_batches

    def check(self) -> None:
        """Read the first samples in this process. Raises ValueError if a shard is missing or no sample is usable."""
        for process in range(1 if self._images.resampled else self._num_processes):
            self._images.check(process, self._num_processes)

    def __iter__(self) -> Iterator[Batch]:
        for batch in itertools.islice(self._loader, self._num_batches):
            if isinstance(batch, str):  # a worker's ValueError; a DataLoader would wrap it in a traceback
                raise ValueError(batch)
            yield batch


def build_stream_loader(
    urls: str,
    transform: Transform,
    order: EpochOrder,
    share: RankShare = RankShare(),  # noqa: B008 - it cannot be changed
    *,
    num_classes: int,
    num_images: int,
    num_workers: int = 0,
    resampled: bool = True,
    shuffle_buffer: int = 1000,
    max_damaged: int | None = None,
    pin_memory: bool = False,
) -> StreamLoader:
    """Build full steps over about `num_images` images of all ranks, from shards in webdataset's brace notation.

    Only the batch size and the seeds of `order` count. `share.start` only selects another random stream than that of
    the epoch's beginning. A damaged sample ends the stream; with `max_damaged`, more than that many between two batches
    of a loading process.

    Raises:
        ValueError: a shard is missing, or, unless `resampled`, there are fewer shards than loading processes over all
            ranks.
    """
    assert order.batch_size % (share.world_size * share.accumulation) == 0, "Config.micro_batch_size refuses it"
    shards = stream_shards(urls)
    num_readers = share.world_size * max(1, num_workers)
    if not resampled and len(shards) < num_readers:
        raise ValueError(
            f"a stream of {len(shards)} shards for {num_readers} loading processes ({share.world_size} ranks x "
            f"{max(1, num_workers)}) leaves some without any; use fewer, or data.stream.resampled"
        )
    images = _StreamImages(shards, transform, order, share, num_classes, resampled, shuffle_buffer, max_damaged)
    num_steps = num_images // order.batch_size
    return StreamLoader(
        images,
        num_steps=num_steps,
        accumulation=share.accumulation,
        num_workers=num_workers,
        pin_memory=pin_memory,
    )


@dataclass(eq=False)
class _StreamImages(IterableDataset[Batch | str]):
    """Endless micro-batches, a stream for each loading process."""

    shards: list[str]
    transform: Transform
    order: EpochOrder
    share: RankShare
    num_classes: int
    resampled: bool
    shuffle_buffer: int
    max_damaged: int | None

    def __post_init__(self) -> None:
        self._unusable: dict[str, _UnusableError] = {}  # since the last batch
        self._has_usable = False  # this pass over the shards

    def __iter__(self) -> Iterator[Batch | str]:
        try:
            yield from self._batches()
        except ValueError as problem:
            yield str(problem)
        except Exception as problem:  # of a library, each its own type
            yield f"the stream {self.shards[0]} ... failed: {type(problem).__name__}: {problem}"

    def check(self, process: int, num_processes: int) -> None:
        """Read what a loading process of this rank reads, up to the first usable sample."""
        reader = self.share.rank * num_processes + process
        num_readers = self.share.world_size * num_processes
        for _ in self._samples(self._own(reader, num_readers), random.Random(0)):
            if self._has_usable:
                break

    def _own(self, reader: int, num_readers: int) -> list[str]:
        return self.shards if self.resampled else self.shards[reader::num_readers]

    def _batches(self) -> Iterator[Batch]:
        worker = get_worker_info()
        number, num_workers = (worker.id, worker.num_workers) if worker else (0, 1)
        reader, num_readers = self.share.rank * num_workers + number, self.share.world_size * num_workers
        step_size, global_size = self.order.batch_size, self.order.batch_size // self.share.accumulation
        randomness = np.random.SeedSequence([self.order.seed, self.order.epoch, self.share.start, reader])
        generators = (np.random.Generator(np.random.Philox(child)) for child in _children(randomness))
        generator = random.Random(int(randomness.generate_state(1)[0]))
        own = self._own(reader, num_readers)
        samples = webdataset.shuffle(self.shuffle_buffer, initial=self.shuffle_buffer, rng=generator)(
            self._samples(own, generator)
        )
        images: list[torch.Tensor] = []
        labels: list[int] = []
        for sample in samples:
            try:
                image, label = self._read(sample)
            except _UnusableError as problem:
                self._note(problem)
                continue
            images.append(image)
            labels.append(label)
            if len(images) == global_size // self.share.world_size:
                transformed = self.transform(images, list(itertools.islice(generators, len(images))))
                ids = torch.full((len(images),), -1)
                damaged = tuple(problem.damage for problem in self._unusable.values())
                leaving = ready_to_leave(transformed)
                yield Batch(leaving, torch.tensor(labels), ids, global_size, step_size, damaged)
                images, labels, self._unusable = [], [], {}

    def _samples(self, own: list[str], generator: random.Random) -> Iterator[dict[str, Any]]:
        """Yield the samples of a process's shards endlessly. Raises ValueError after a pass without a usable one."""
        num_samples: dict[str, int] = {}  # of each shard of this pass
        self._unusable, self._has_usable = {}, False
        for url in self._urls(own, generator):
            num_samples[url] = 0
            for sample in self._members(url):
                num_samples[url] += 1
                if not self._has_usable:
                    try:
                        self._read(sample)
                        self._has_usable = True
                    except _UnusableError as problem:
                        self._note(problem)
                yield sample
            if len(num_samples) == len(set(own)):
                if not self._has_usable:
                    raise ValueError(self._refusal(f"none in a round of {len(num_samples)} shard(s)", num_samples))
                num_samples, self._has_usable = {}, False

    def _urls(self, own: list[str], generator: random.Random) -> Iterator[str]:
        while True:
            if self.resampled:
                yield generator.choice(own)
            else:
                yield from generator.sample(own, len(own))

    def _members(self, url: str) -> Iterator[dict[str, Any]]:
        """Yield the samples of a shard, by webdataset's rules. Raises ShardUnavailableError if it is missing."""

        def passed_over(problem: Exception) -> bool:
            reason = str(problem.args[0] if problem.args else problem).partition(" @ ")[0]  # of the stream object
            self._note(_UnusableError(url, url, "place that is damaged", reason[:200] or type(problem).__name__))
            return True

        try:
            stream = gopen(url)
        except Exception as problem:  # the system's, or webdataset's own
            raise ShardUnavailableError(f"{url} cannot be opened: {problem}; correct data.stream.urls") from problem
        failure, is_done = None, False
        try:
            members = ({**member, "__url__": url} for member in tar_file_iterator(stream))
            yield from group_by_keys(members, handler=passed_over)
            is_done = True
        except (tarfile.TarError, OSError, EOFError, zlib.error) as problem:
            failure, is_done = problem, True
        finally:
            status = _end(stream, to_its_end=is_done)
        if status:
            raise ShardUnavailableError(
                f"{url} cannot be fetched: the program that gives it ended with status {status}; correct "
                "data.stream.urls, or mend the connection"
            )
        if failure is not None:
            passed_over(failure)

    def _read(self, sample: dict[str, Any]) -> tuple[torch.Tensor, int]:
        """Read image and label. Raises _UnusableError."""
        url = sample["__url__"]
        name = f"{url}, sample {shown_key(split_name(sample['__key__'] + '.')[0])}"
        payload = next((sample[extension] for extension in IMAGE_EXTENSIONS if extension in sample), None)
        if payload is None or "cls" not in sample:
            kind = "without an image that is read" if payload is None else "without a label"
            members = [field for field in sample if not field.startswith("__")]
            raise _UnusableError(url, name, kind, wrong_members(members))
        label = read_label(sample["cls"])
        if not isinstance(label, int) or label >= self.num_classes:
            reason = f"has the label {str(label)!r}; expected 0 to {self.num_classes - 1}, by data.num_classes"
            raise _UnusableError(url, name, "with a wrong label", reason)
        try:
            return decode_image(payload, upright=_is_upright(sample)), label
        except ValueError as problem:
            raise _UnusableError(url, name, "that cannot be decoded", str(problem)) from problem

    def _note(self, problem: "_UnusableError") -> None:
        """Record an unusable sample, to be counted with the next batch. Raises it if it ends the stream, or ValueError
        if there are too many.
        """
        if self.max_damaged is None:
            raise problem
        self._unusable[problem.damage.image] = problem
        if len(self._unusable) > (self.max_damaged if self._has_usable else max(self.max_damaged, _NUM_TRIED)):
            raise ValueError(
                self._refusal(f"{len(self._unusable)} that cannot be used (data.max_damaged allows {self.max_damaged})")
            )

    def _refusal(self, got: str, num_samples: Mapping[str, int] | None = None) -> str:
        counts: dict[str, Counter[str]] = {url: Counter() for url, number in (num_samples or {}).items() if not number}
        for problem in self._unusable.values():
            counts.setdefault(problem.url, Counter())[problem.kind] += 1
        shown = [
            f"{url.rpartition('/')[2]}: "
            + (", ".join(f"{number} {kind}" for kind, number in counts[url].items()) or "no samples")
            for url in sorted(counts)[:5]
        ]
        more = f"; and {len(counts) - 5} more shards" if len(counts) > 5 else ""
        first = next(iter(self._unusable.values()), None)
        example = "" if first is None else f"; the first is {first}"
        return (
            f"expected samples to train from {self.shards[0]}{' ...' if len(self.shards) > 1 else ''}, got {got}: "
            f"{'; '.join(shown)}{more}{example}; correct data.stream.urls or mend the shards"
        )


class _UnusableError(ValueError):
    """A sample, or the rest of a shard, that cannot be used."""

    def __init__(self, url: str, image: str, kind: str, reason: str) -> None:
        super().__init__(f"{image} {reason}" if reason.startswith("has ") else f"{image}: {reason}")
        self.url = url
        self.kind = kind  # for counts
        self.damage = Damage(image, reason)


def _is_upright(sample: Mapping[str, Any]) -> bool:
    """Whether a shard of `build` says that its image is turned as it is read."""
    text = sample.get("json", b"")
    try:
        return b'"exif"' in text and parse_json(text).get("exif") == "applied"
    except (ValueError, AttributeError):
        return False


def _end(stream: IO[bytes] | Pipe, *, to_its_end: bool) -> int:
    """Close a shard; return the exit status of its program, 0 for a file.

    A program is read `to_its_end` first, since closing its output early would make it fail; otherwise it is killed.
    """
    with contextlib.suppress(OSError):
        if isinstance(stream, Pipe):
            while to_its_end and stream.stream.read(1 << 20):
                pass
            if not to_its_end:
                stream.proc.kill()
            stream.stream.close()
            return int(stream.proc.wait())
        stream.close()
    return 0


def stream_shards(urls: str) -> list[str]:
    """Expand webdataset's brace notation to shards.

    Raises:
        ValueError: the notation is wrong, or a local shard is not a file.
    """
    try:
        shards: list[str] = webdataset.shardlists.expand_urls(urls)
    except Exception as problem:  # braceexpand's, and assertions about the environment
        raise ValueError(f"data.stream.urls {urls!r} cannot be expanded: {problem}; correct its braces") from None
    paths = {url: re.sub("^file://?", "", url) for url in shards if urlparse(url).scheme in ("", "file")}
    missing = [url for url, path in paths.items() if not os.path.isfile(path)]
    if missing or not shards:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise ValueError(
            f"data.stream.urls names {len(shards)} shards, expected plain files, got none at {shown or 'all'}; correct "
            "the path; ranges are written {000000..000012}"
        )
    return shards


def _children(sequence: np.random.SeedSequence) -> Iterator[np.random.SeedSequence]:
    while True:
        yield from sequence.spawn(1)
