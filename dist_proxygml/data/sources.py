"""Sources of images to embed: any folder of images, or a split of shards.

    open_source("photos")                      every image file below it, sorted by path
    open_source("shards/sop", split="test")    every image of the split, in the order of its index

Both yield batches in a fixed order for any number of loading processes, name unusable images, and find an image by its
record, to show it. Images are decoded as in training and evaluation, those of a folder upright (EXIF orientation).
Chosen: a folder needs no labels and no layout; links are followed, each real folder once.
Declined: interpreting folder names as classes, since many folders are only folders.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch

from dist_proxygml.data.damage import Damage
from dist_proxygml.data.datasets import IMAGE_SUFFIXES, is_hidden
from dist_proxygml.data.images import decode_image, read_image_file
from dist_proxygml.data.index import INDEX_FILE, ShardIndex, open_index
from dist_proxygml.data.order import MicroBatch
from dist_proxygml.data.pipeline import (
    Batch,
    BatchLoader,
    BatchSource,
    ImageCache,
    ShardImages,
    sample_generators,
    sent,
)
from dist_proxygml.data.remote import is_remote
from dist_proxygml.data.transforms import Resize, Transform
from dist_proxygml.storage.files import parse_json, paths_in, refuse_unreadable

OnBad = Literal["fail", "skip"]


class ImageRecord(NamedTuple):
    """Identity of the image of a row of embeddings."""

    id: str  # path below the folder, or key of the sample, prefixed by its shard's name if keys repeat
    label: int | None = None
    class_name: str | None = None
    sample: int | None = None  # its position in the split's index

    def to_json(self) -> str:
        """Serialise to one line, omitting unknown fields."""
        return json.dumps({name: value for name, value in self._asdict().items() if value is not None})

    @classmethod
    def from_json(cls, line: str | bytes) -> "ImageRecord":
        """Parse the output of `to_json`. Raises ValueError, TypeError or KeyError for anything else."""
        record = cls(**parse_json(line))
        numbers = [number for number in (record.label, record.sample) if number is not None]
        if not isinstance(record.id, str) or not isinstance(record.class_name, str | None):
            raise TypeError(f"expected names, got {record.id!r} and {record.class_name!r}")
        if any(type(number) is not int for number in numbers) or (record.sample or 0) < 0:
            raise TypeError(f"expected whole numbers, got {numbers}")
        return record


class ImageSource(Protocol):
    """Images in a fixed order."""

    num_images: int

    def about(self) -> dict[str, Any]:
        """Describe the source for a manifest: everything that must match for the same embeddings."""

    def record(self, number: int) -> ImageRecord:
        """Return the record of the image at a position."""

    def image(self, record: ImageRecord) -> torch.Tensor:
        """Decode an image, uint8 RGB [3, h, w]. Raises ValueError if it is no longer usable."""

    def loader(
        self, transform: Transform, batches: Sequence[np.ndarray], *, num_workers: int = 0, on_bad: OnBad = "fail"
    ) -> BatchLoader:
        """Build a loader of batches of these positions. With "skip" a batch omits and names unusable images."""


def open_source(location: str | Path, *, split: str = "test", is_typed: bool = False) -> ImageSource:
    """Open a split of shards if there is an index or a URL, otherwise a folder; `is_typed` as in `open_index`.

    Raises:
        ValueError: it is neither; or as `open_index`.
    """
    if is_remote(str(location)):
        return ShardSource(open_index(location, split, is_typed=is_typed))
    folder = Path(location)
    if (folder / INDEX_FILE).is_file() and paths_in(folder, "*.tar"):
        return ShardSource(open_index(folder, split))
    return FolderSource.of_folder(folder)


# ---- a folder --------------------------------------------------------------------------------------------------------


class FolderSource:
    """Image files, named by their paths below `root`."""

    def __init__(self, root: Path, names: Sequence[str]) -> None:
        self.root = root
        self.names = names
        self.num_images = len(names)

    @classmethod
    def of_folder(cls, root: Path) -> "FolderSource":
        """List all image files below a folder, except hidden ones.

        Raises:
            ValueError: the folder does not exist, has no image, or contains a name that is not UTF-8.
        """
        if not root.is_dir():
            raise ValueError(f"expected a folder of images or of shards at {root}, found none; correct the path")
        names, num_others = _image_names(root)
        if not names:
            num_tars = len(paths_in(root, "*.tar"))
            hint = (
                f"; for its {num_tars} tar files run `python -m dist_proxygml.shard index {root}`" if num_tars else ""
            )
            raise ValueError(
                f"expected image files ({', '.join(sorted(IMAGE_SUFFIXES))}) in {root} or below it, found none among "
                f"{num_others} files{hint}"
            )
        return cls(root, names)

    def about(self) -> dict[str, Any]:
        """Return location, number of images, and a hash of their names, sizes and times."""
        digest = hashlib.sha256()
        for name in self.names:
            try:
                status = (self.root / name).stat()
                digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
            except OSError:  # a broken link: reading it will report so
                digest.update(f"{name}\n".encode())
        return {
            "kind": "folder",
            "location": str(self.root.resolve()),
            "num_images": self.num_images,
            "listing_sha256": digest.hexdigest(),
            "exif": "applied",
        }

    def record(self, number: int) -> ImageRecord:
        """Return the path only."""
        return ImageRecord(self.names[number])

    def image(self, record: ImageRecord) -> torch.Tensor:
        """As `ImageSource.image`."""
        # The name, and perhaps the folder, comes from a possibly untrusted file.
        path, name = self.root / record.id, Path(record.id)
        is_image = name.suffix.lower() in IMAGE_SUFFIXES and not (path.exists() and not path.is_file())
        if name.is_absolute() or ".." in name.parts or not is_image:
            raise ValueError(
                f"expected an image file below {self.root}, got {record.id!r}; name its folder with --data"
            )
        return read_image(path)

    def loader(
        self, transform: Transform, batches: Sequence[np.ndarray], *, num_workers: int = 0, on_bad: OnBad = "fail"
    ) -> BatchLoader:
        """As `ImageSource.loader`."""
        files = FolderImages([self.root / name for name in self.names], transform, on_bad=on_bad)
        return _loader(files, batches, num_workers=num_workers)


class FolderImages:
    """Image files by number, without labels (-1), indexed by whole batches like ShardImages."""

    cache: ImageCache | None = None

    def __init__(self, paths: Sequence[Path], transform: Transform, *, on_bad: OnBad) -> None:
        self.paths = paths
        self.transform = transform
        self.on_bad = on_bad

    def __len__(self) -> int:
        return len(self.paths)

    def batch(self, micro_batch: MicroBatch) -> Batch:
        """Read, decode and transform images. Raises ValueError for an unusable one, if configured to fail."""
        ids, images, damaged = [], [], []
        for number in micro_batch.ids.tolist():
            try:
                images.append(read_image(self.paths[number]))
            except ValueError as problem:
                if self.on_bad == "fail":
                    raise
                path = str(self.paths[number])
                damaged.append(Damage(path, str(problem).removeprefix(f"{path}: ")))
                continue
            ids.append(number)
        images_b3HW = torch.zeros(0, 3, 1, 1, dtype=torch.uint8)
        if images:
            images_b3HW = self.transform(images, sample_generators(ids, seed=0, epoch=0))
        ids_b = torch.tensor(ids, dtype=torch.int64)
        num_images = len(micro_batch.ids)
        return Batch(images_b3HW, torch.full_like(ids_b, -1), ids_b, num_images, num_images, tuple(damaged))

    def __getitems__(self, micro_batch: MicroBatch) -> Any:
        return sent(self.batch, micro_batch)


def read_image(path: Path) -> torch.Tensor:
    """Decode an image file, uint8 RGB [3, h, w], as viewers show it (EXIF orientation).

    Raises:
        ValueError: it cannot be read or is not an image; the message names it.
    """
    try:
        return decode_image(read_image_file(path), upright=True, avif=True)
    except ValueError as problem:
        raise ValueError(f"{path}: {problem}") from problem


def _image_names(root: Path) -> tuple[list[str], int]:
    """Return the sorted paths from `root` of the image files below it, and the number of other files."""
    names, num_others = [], 0
    seen = {os.path.realpath(root)}
    for folder, folders, files in os.walk(root, followlinks=True, onerror=refuse_unreadable):
        real = {name: os.path.realpath(os.path.join(folder, name)) for name in sorted(folders)}
        folders[:] = [name for name in real if not is_hidden(name) and real[name] not in seen]
        seen.update(real[name] for name in folders)
        for file in files:
            name = os.path.relpath(os.path.join(folder, file), root)
            if is_hidden(file) or os.path.splitext(file)[1].lower() not in IMAGE_SUFFIXES:
                num_others += 1
                continue
            try:
                name.encode("utf-8")
            except UnicodeEncodeError:
                raise ValueError(f"the name of {os.path.join(folder, file)!r} is not UTF-8; rename it") from None
            names.append(name)
    return sorted(names), num_others


# ---- shards ----------------------------------------------------------------------------------------------------------


class ShardSource:
    """A split of shards, its images named by their keys."""

    def __init__(self, index: ShardIndex) -> None:
        self.index = index
        self.num_images = index.num_samples
        self._images = ShardImages(index, Resize(1))  # for reading only

    def about(self) -> dict[str, Any]:
        """Return location, split, number of images, data set, and the hash of the index."""
        local = self.index.remote is None
        return {
            "kind": "shards",
            "location": str(self.index.root.resolve()) if local else self.index.location,
            "split": self.index.split,
            "num_images": self.num_images,
            "dataset": self.index.dataset,
            "index_sha256": self.index.sha256,
        }

    def record(self, number: int) -> ImageRecord:
        """Return name, label and class."""
        label = int(self.index.samples["label"][number])
        return ImageRecord(self.index.name(number), label, self.index.classes[label].name, number)

    def image(self, record: ImageRecord) -> torch.Tensor:
        """As `ImageSource.image`."""
        if record.sample is None or record.sample >= self.num_images:
            raise ValueError(f"{self.index.location} has no sample {record.id}")
        return self._images.image(record.sample)

    def loader(
        self, transform: Transform, batches: Sequence[np.ndarray], *, num_workers: int = 0, on_bad: OnBad = "fail"
    ) -> BatchLoader:
        """As `ImageSource.loader`."""
        images = ShardImages(self.index, transform, damaged="leave_out" if on_bad == "skip" else "fail")
        return _loader(images, batches, num_workers=num_workers)


def _loader(images: BatchSource, batches: Sequence[np.ndarray], *, num_workers: int) -> BatchLoader:
    cut = [MicroBatch(ids, len(ids), len(ids)) for ids in batches]
    return BatchLoader(images, cut, num_workers=num_workers, num_steps=len(cut), pin_memory=False)
