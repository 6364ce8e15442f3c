"""Whether exported files give what the trained backbone gives: embeddings and Recall@1 of the same images from both.

    original   the checkpoint's weights in a backbone built from its run's configuration
    exported   each file, opened afresh from the folder that is to be published

Images are a sample of the run's test split, made of whole classes (up to IMAGES_PER_CLASS of each), since of images
drawn singly few would have another of their class. The exported file gets them in batches of 1, of 5 and of 64: the
number of images must not matter. A graph computes in float32, and so does the original that it is held against; weights
in safetensors keep the precision they were trained in on both sides.

Neighbours whose similarities are closer than TIE count as equal, and a query with a right answer among the equal ones
as right. Otherwise the last bit would decide between two copies of one image, and the check would fail for no fault.
Nor may it decide what is closer than TIE: within half a TIE of that limit an exported file counts as the original does.

Dimension key: n images, D embedding, S side of an image.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dist_proxygml.backbones.build import EmbeddingModel, build_backbone
from dist_proxygml.checkpoint.writer import load_backbone
from dist_proxygml.cli import printable
from dist_proxygml.config import Config
from dist_proxygml.data.index import ShardIndex
from dist_proxygml.data.order import MicroBatch
from dist_proxygml.data.pipeline import ShardImages
from dist_proxygml.data.transforms import build_transform
from dist_proxygml.evaluation import metrics
from dist_proxygml.inference.graph import Embed
from dist_proxygml.training.data import open_split

LIMIT = 1e-4
NUM_IMAGES = 512
NUM_RANDOM_IMAGES = 64
IMAGES_PER_CLASS = 16
TIE = 1e-5  # of similarities: above what exports differ by, a tenth of what they may
_BATCH_SIZE = 64
_FIRST_BATCHES = (1, 5)


class CheckImages(NamedTuple):
    """Images that both sides embed."""

    images: Tensor  # uint8 [n, 3, S, S]
    labels: Tensor | None  # int64 [n]; None for random images, which have no right answers
    source: str  # in words


@dataclass(frozen=True)
class FileCheck:
    """Result for one file; `passed` is whether it may be published."""

    file: str
    format: str
    precision: str
    """That both sides computed in."""
    num_images: int
    largest_difference: float
    """Between any two numbers of the embeddings; NaN if either side has one."""
    recall_at_1: float | None
    """Of the original among these images, as a fraction; None for random images."""
    recall_at_1_exported: float | None

    @property
    def recall_difference(self) -> float | None:
        """Difference of the two, as text."""
        if self.recall_at_1 is None or self.recall_at_1_exported is None:
            return None
        return abs(self.recall_at_1 - self.recall_at_1_exported)

    @property
    def passed(self) -> bool:
        """Neither difference is above LIMIT; NaN is."""
        return self.largest_difference <= LIMIT and (self.recall_difference or 0.0) <= LIMIT

    def as_json(self) -> dict[str, Any]:
        """Entry of the export's manifest."""
        return asdict(self) | {"recall_at_1_difference": self.recall_difference}


class ExportDiffersError(Exception):
    """A file does not give what the trained backbone gives, or does not run at all."""


def original_backbone(config: Config, folder: Path) -> EmbeddingModel:
    """The backbone of a checkpoint or an export in evaluation mode, in the precision it was trained in.

    Raises:
        ValueError: the folder's weights are missing or those of another network.
    """
    with torch.random.fork_rng(devices=[]):
        model = build_backbone(config.backbone, load_pretrained=False)
    load_backbone(folder, model)
    return model.eval()


def check_images(config: Config, *, data: str | None = None) -> CheckImages:
    """A sample of the run's test split, or of its training split if it has none; random images where its shards are
    not there.

    Args:
        config: of the run.
        data: shards to take instead of the run's own.

    Raises:
        ValueError: `data` cannot be opened, or an image is damaged.
    """
    try:
        index = open_split(config, config.data.test_split or config.data.train_split, shards=data)
    except ValueError as problem:
        if data is not None:
            raise
        side = config.data.test_transform.side
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (NUM_RANDOM_IMAGES, 3, side, side), dtype=torch.uint8, generator=generator)
        print(f"verifying with random images, the run's own cannot be had: {printable(problem)}", file=sys.stderr)
        return CheckImages(images, None, f"{NUM_RANDOM_IMAGES} random images, as the run's test images were not there")
    return _sample(config, index)


def check_file(
    embed: Callable[[], Embed], original_nD: Tensor, images: CheckImages, *, file: str, format: str, precision: str
) -> FileCheck:
    """Hold one file against the original's embeddings of the same images.

    Args:
        embed: opens the file.
        original_nD: what `embed_all` gave for the original.
        images: the images.
        file: its name.
        format: its format, for the record.
        precision: of both sides, for the record.

    Raises:
        ExportDiffersError: the file cannot be opened or run.
    """
    try:
        exported_nD = embed_all(embed(), images.images, name=file, first_batches=_FIRST_BATCHES)
    except Exception as error:  # each runtime fails in types of its own
        raise ExportDiffersError(f"{file} was written but does not run: {error}") from error
    if exported_nD.shape != original_nD.shape or exported_nD.dtype != torch.float32:
        raise ExportDiffersError(
            f"{file} gives {exported_nD.dtype} {list(exported_nD.shape)}, expected float32 {list(original_nD.shape)}"
        )
    recalls = _recalls_at_1(original_nD, exported_nD, images.labels)
    difference = float((exported_nD - original_nD).abs().max())
    return FileCheck(file, format, precision, len(exported_nD), difference, *recalls)


def embed_all(embed: Embed, images: Tensor, *, name: str, first_batches: Sequence[int] = ()) -> Tensor:
    """Embeddings float32 [n, D] of images uint8 [n, 3, S, S], in batches of the sizes given first, then of 64."""
    sizes, rest = [], len(images)
    for size in first_batches:
        sizes.append(min(size, rest))
        rest -= sizes[-1]
    sizes += [_BATCH_SIZE] * (rest // _BATCH_SIZE) + [rest % _BATCH_SIZE]
    rows = []
    with torch.inference_mode(), tqdm(total=len(images), desc=name, unit=" images", delay=1.0) as bar:
        for batch in images.split(sizes):
            if len(batch):
                rows.append(embed(batch))
                bar.update(len(batch))
    return torch.cat(rows)


def format_checks(checks: Sequence[FileCheck]) -> str:
    """The checks as a table for the terminal; Recall@1 in percent."""
    lines = [f"{'file':<22} {'precision':<9} {'embeddings':>11} {'R@1 before':>11} {'exported':>9} {'differ by':>9}"]
    for check in checks:
        before, after, apart = (
            "-" if value is None else f"{100 * value:.2f}"
            for value in (check.recall_at_1, check.recall_at_1_exported, check.recall_difference)
        )
        verdict = "" if check.passed else "  TOO FAR"
        lines.append(
            f"{check.file:<22} {check.precision:<9} {check.largest_difference:>11.1e} {before:>11} {after:>9} "
            f"{apart:>9}{verdict}"
        )
    return "\n".join(lines)


def _sample(config: Config, index: ShardIndex) -> CheckImages:
    """Whole classes in an order of their own until there are NUM_IMAGES, the same for every export."""
    labels_n = index.labels
    order_n = np.argsort(labels_n, kind="stable")
    starts = np.flatnonzero(np.diff(labels_n[order_n], prepend=-1))
    of_class = np.split(order_n, starts[1:])
    chosen: list[int] = []
    for label in np.random.default_rng(0).permutation(len(of_class)):
        chosen += of_class[label][: min(IMAGES_PER_CLASS, NUM_IMAGES - len(chosen))].tolist()
        if len(chosen) == NUM_IMAGES:
            break
    ids = np.array(sorted(chosen))
    shards = ShardImages(
        index,
        build_transform(config.data.test_transform),
        damaged="leave_out" if config.data.damaged_images == "skip" else "fail",
    )
    images, labels = [], []
    with tqdm(total=len(ids), desc="reading", unit=" images", delay=1.0) as bar:
        for start in range(0, len(ids), _BATCH_SIZE):
            part = ids[start : start + _BATCH_SIZE]
            batch = shards.batch(MicroBatch(part, len(part), len(part)))
            if len(batch.ids):
                images.append(batch.images)
                labels.append(batch.labels)
            bar.update(len(part))
    if not images:
        raise ValueError(f"no image of {index.location}, split {index.split!r}, can be read; name others with --data")
    found = torch.cat(labels)
    dataset = index.dataset or "the shards"
    source = f"{len(found):,} images of {len(found.unique()):,} classes of {dataset}, split {index.split}"
    return CheckImages(torch.cat(images), found, source)


def _recalls_at_1(original_nD: Tensor, exported_nD: Tensor, labels: Tensor | None) -> tuple[float | None, float | None]:
    """Recall@1 of every image among all others, of both sides; None where no image has another of its class."""
    query_n = metrics.count_positives(labels.numpy()) > 0 if labels is not None else np.zeros(0, dtype=bool)
    if labels is None or not query_n.any() or not original_nD.isfinite().all():
        return None, None
    original_n = _leads(original_nD, labels)
    recall = metrics.exact_mean((original_n >= 0).numpy()[query_n].astype(np.float64))
    if not exported_nD.isfinite().all():
        return recall, None
    exported_n = _leads(exported_nD, labels)
    is_right_n = torch.where(exported_n.abs() < TIE / 2, original_n, exported_n) >= 0
    return recall, metrics.exact_mean(is_right_n.numpy()[query_n].astype(np.float64))


def _leads(rows_nD: Tensor, labels: Tensor) -> Tensor:
    """How far each image's nearest of its class is ahead of its nearest other one, TIE included; [n]."""
    is_same_nn = labels[:, None] == labels
    scores_nn = (rows_nD @ rows_nD.T).fill_diagonal_(-np.inf)
    best_right_n = scores_nn.masked_fill(~is_same_nn, -np.inf).amax(dim=1)
    best_wrong_n = scores_nn.masked_fill(is_same_nn, -np.inf).amax(dim=1)
    return best_right_n - (best_wrong_n - TIE)
