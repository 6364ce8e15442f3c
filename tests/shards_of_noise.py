"""A folder of shards small enough for any test: each class has a random pattern, each image is it with noise."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dist_proxygml.data.index import ShardIndex, open_index, write_index
from dist_proxygml.data.shards import ShardSample, list_shard, sample_key, shard_name, write_shard

SIDE = 8


def write_noise_shards(
    root: Path,
    class_sizes: list[int],
    *,
    num_shards: int = 2,
    copy_of: dict[int, int] | None = None,
) -> ShardIndex:
    """The split "test" of random images with these numbers of images a class, ids shuffled over the
    classes.

    `copy_of` maps an id to the id whose image it repeats byte for byte.
    """
    generator = np.random.default_rng(len(class_sizes))
    patterns = generator.integers(0, 256, (len(class_sizes), SIDE, SIDE, 3))
    labels = generator.permutation(np.repeat(np.arange(len(class_sizes)), class_sizes))
    noise = generator.normal(0, 70, (len(labels), SIDE, SIDE, 3))
    images = [_png(np.clip(patterns[label] + noise[i], 0, 255)) for i, label in enumerate(labels)]
    for copied, original in (copy_of or {}).items():
        images[copied] = images[original]
    samples = [
        ShardSample(sample_key("test", i), "png", image, int(label), {})
        for i, (image, label) in enumerate(zip(images, labels, strict=True))
    ]
    root.mkdir(parents=True, exist_ok=True)
    files = []
    for number, part in enumerate(np.array_split(np.arange(len(samples)), num_shards)):
        name = shard_name("test", number)
        write_shard(root / name, [samples[i] for i in part])
        files.append((name, list_shard(root / name)))
    names = [(f"pattern {label} <&>", label) for label in range(len(class_sizes))]
    write_index(root, dataset="noise", build={}, shards={"test": files}, classes={"test": names})
    return open_index(root, "test")


def write_query_and_gallery(
    root: Path, class_sizes: list[int], *, every: int = 3, whole: Sequence[str] = ()
) -> tuple[ShardIndex, ShardIndex]:
    """The images of `write_noise_shards` as the splits "query", one in `every` of them, and "gallery", the others; and
    all of them as each of `whole`.
    """
    images = write_noise_shards(root / "whole", class_sizes)
    samples: dict[str, list[ShardSample]] = {split: [] for split in ("query", "gallery", *whole)}
    for sample_id, row in enumerate(images.samples):
        with open(images.shard_paths[row["shard"]], "rb") as shard:
            shard.seek(int(row["offset"]))
            image = shard.read(int(row["nbytes"]))
        for split in ("gallery" if sample_id % every else "query", *whole):
            samples[split].append(ShardSample(sample_key("test", sample_id), "png", image, int(row["label"]), {}))
    shards = {}
    for split, of_split in samples.items():
        write_shard(root / shard_name(split, 0), of_split)
        shards[split] = [(shard_name(split, 0), list_shard(root / shard_name(split, 0)))]
    names = [(f"pattern {label} <&>", label) for label in range(len(class_sizes))]
    classes = dict.fromkeys(samples, names)
    write_index(root, dataset="noise", build={}, shards=shards, classes=classes)
    return open_index(root, "query"), open_index(root, "gallery")


class Projection(nn.Module):
    """A fixed random projection of the pixels. Computed row by row, so that a row does not depend
    on its batch's size.
    """

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        weights = torch.randn(3 * SIDE * SIDE, width, generator=torch.Generator().manual_seed(0))
        self.weights_FD = nn.Parameter(weights)
        self.frozen = nn.BatchNorm1d(1).eval()

    def forward(self, images: Tensor) -> Tensor:
        pixels_bF = images.flatten(1).float() / 255 - 0.5
        return torch.stack([(row[:, None] * self.weights_FD).sum(dim=0) for row in pixels_bF])


def _png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(stream, "PNG")
    return stream.getvalue()
